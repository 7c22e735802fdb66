"""Reading files that may come from strangers: bounded, checked where they are parsed, failing in one line.

Everything that reads JSON or YAML, or takes a file name out of a file, goes through here:

* `reading` turns any failure of a parser into a `UserError` that names the file and the place.
* `read_bytes` refuses what is not a regular file, and files above a size, before it reads.
* `read_json` and `read_yaml` refuse duplicate keys, NaN, deep nesting, long integers and aliases that multiply.
* `parse_as` builds a dataclass strictly: unknown, missing and mistyped keys are refused by name.
* `name_inside` accepts a plain relative path that stays inside its root, links included.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from scmdm.errors import UserError

T = TypeVar("T")
LARGEST_TEXT = 256 * 2**20  # bytes of a JSON or YAML file
DEEPEST = 64  # levels of nesting
_MOST_NODES = 10_000_000  # values of a file, aliases of YAML counted as often as they are used
_LONGEST_INTEGER = 4_000  # digits; beyond it Python's conversion takes quadratic time
_LONGEST_NAME = 200  # bytes; file systems take 255, also with what temporary names add
_NOT_IN_NAMES = re.compile(r"[\\\x00-\x1f\x7f]")
_ESCAPED_SURROGATE = re.compile(r"[\ud800-\udfff]")


@contextmanager
def reading(path: Path | str, what: str, remedy: str = "") -> Iterator[None]:
    """Turn any failure inside the block into a UserError that names `path`, what it should be, and the remedy.

    A parser of outside data can raise any class; lists of classes always miss one. UserErrors pass unchanged; so do
    KeyboardInterrupt and SystemExit, which are not `Exception`s.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is not a readable {what}: {describe(error)}{remedy and f'; {remedy}'}") from error


def describe(error: BaseException) -> str:
    """One line of at most 200 characters: the system's reason, or the class and its message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def require_regular(path: Path) -> os.stat_result:
    """The status of a regular file, links followed. Raises OSError otherwise: a FIFO would block for ever."""
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(21, "is a directory", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(22, "is not a regular file", str(path))
    return status


def read_bytes(path: Path, limit: int = LARGEST_TEXT) -> bytes:
    """Contents of a regular file. Raises OSError for other kinds of files and UserError above `limit` bytes."""
    size = require_regular(path).st_size
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} has {max(size, len(data))} bytes; at most {limit} are read of such a file")
    return data


def read_json(path: Path, what: str = "JSON file", *, limit: int = LARGEST_TEXT, remedy: str = "") -> Any:
    """Parse a JSON file. Raises UserError, which names the file; FileNotFoundError when there is none."""
    try:
        require_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(2, "no such file", str(path)) from error
    except OSError as error:
        raise UserError(f"{path} is not a readable {what}: {describe(error)}{remedy and f'; {remedy}'}") from error
    with reading(path, what, remedy):
        return parse_json(read_bytes(path, limit))


def parse_json(text: bytes | str, *, nan_is_null: bool = False) -> Any:
    """Parse JSON strictly: UTF-8, each key once, finite numbers, bounded depth, no lone surrogates.

    With `nan_is_null`, NaN and Infinity, which Python's `json` writes, become None; otherwise they are refused.

    Raises ValueError (or RecursionError) for other content.
    """
    decoded = text.decode() if isinstance(text, bytes) else text
    constant = _none_for_constant if nan_is_null else _refuse_constant
    content = json.loads(
        decoded, object_pairs_hook=_unique, parse_constant=constant, parse_int=_integer, parse_float=_float
    )
    check_bounds(content)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate key {counts.most_common(1)[0][0]!r}")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number that JSON has")


_ROWS = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_json_row(text: str) -> Any:
    """Parse one of millions of JSON texts of bounded size: each key once, no NaN.

    Unlike `parse_json`, the values are not walked: the caller checks those that it uses. Raises ValueError or
    RecursionError.
    """
    return _ROWS.decode(text)


def _none_for_constant(_name: str) -> None:
    return None


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:40]} is beyond the range of floating-point numbers")
    return value


def check_bounds(content: Any) -> None:
    """Raise ValueError for nesting beyond `DEEPEST`, too many values, or text that UTF-8 cannot encode."""
    nodes, level = 0, [content]
    for _ in range(DEEPEST + 1):
        following: list[Any] = []
        for value in level:
            nodes += 1
            if isinstance(value, str):  # first, because most values of large files are text
                if _ESCAPED_SURROGATE.search(value):
                    raise ValueError("text with half of a surrogate pair")
            elif isinstance(value, Mapping):
                following.extend(value.keys())
                following.extend(value.values())
            elif isinstance(value, list | tuple):
                following.extend(value)
        if nodes + len(following) > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES:,} values")
        if not following:
            return
        level = following
    raise ValueError(f"nested more than {DEEPEST} levels deep")


_MERGE = "tag:yaml.org,2002:merge"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe types, each key once; nesting and repeated aliases are bounded while composing."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # values below a node, by its identity

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} levels deep", problem_mark=self.get_mark())
        alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias inside its own anchor", problem_mark=node.start_mark)
        self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if self._sizes[id(node)] > _MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MOST_NODES:,} values", problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping: each key once, `<<` replaced by the keys of its mappings that the mapping itself lacks.

        PyYAML merges while it constructs, and takes the wrong one of two values in a chain of merges.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        found: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value in node.value:
            name = _MERGE if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if isinstance(name, list | dict | set):
                raise yaml.MarkedYAMLError(problem="a key that is a list or mapping", problem_mark=key_node.start_mark)
            if name in found:
                first = found[name][0].start_mark.line + 1
                shown = "<<" if name == _MERGE else name
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {shown!r}, first in line {first}", problem_mark=key_node.start_mark
                )
            found[name] = key_node, value
        if _MERGE in found:
            for key_node, value in _merged_pairs(found.pop(_MERGE)[1]):
                found.setdefault(self.construct_object(key_node, deep=True), (key_node, value))
        node.value = list(found.values())
        return node


def _merged_pairs(value: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    for mapping in value.value if isinstance(value, yaml.SequenceNode) else [value]:
        if not isinstance(mapping, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="`<<` of a value that is not a mapping", problem_mark=mapping.start_mark)
        yield from mapping.value


def _decimal(loader: _StrictLoader, node: yaml.ScalarNode) -> int | float:
    """Build a number. YAML 1.1 reads `1:30` as 90 and `010` as 8, which nobody means."""
    base = 60 if ":" in node.value else 8 if _OCTAL.fullmatch(node.value) else None
    if base is not None:
        problem = f"{node.value} is a number of base {base} in YAML; leave out leading zeros, or put text in quotes"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    build = loader.construct_yaml_int if node.tag.endswith(":int") else loader.construct_yaml_float
    return build(node)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _decimal)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def read_yaml(path: Path) -> Any:
    """Parse a YAML file with the safe types, each key once. Raises UserError, which names file, line and column."""
    with reading(path, "YAML file"):
        return parse_yaml(read_bytes(path).decode())


def parse_yaml(text: str) -> Any:
    """Parse YAML strictly. Raises yaml.YAMLError or ValueError."""
    loader = _StrictLoader(text)
    loader.name = "the text"  # in messages, instead of "<unicode string>"
    try:
        content = loader.get_single_data()
    finally:
        loader.dispose()
    check_bounds(content)
    return content


@lru_cache(maxsize=128)  # making one takes about a millisecond
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def parse_as(schema: type[T], content: Any, path: Path | str, remedy: str = "") -> T:
    """Build a dataclass from parsed JSON: types exactly as declared, no key unknown, none missing.

    Raises UserError that names the file, the place in it (as in `splits.train.samples`), what was found and what is
    expected.
    """
    try:
        # As JSON: in strict mode Python input would have to be an instance of the dataclass already.
        return cast(T, _adapter(cast(Any, schema)).validate_json(json.dumps(content), strict=True, extra="forbid"))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file as a whole"
        found = repr(first["input"])
        found = found if len(found) <= 60 else f"{found[:57]}..."
        raise UserError(f"{path}: {place}={found}: {first['msg']}{remedy and f'; {remedy}'}") from error


def require_plain_name(name: Any, root: Path | str, where: Path | str) -> None:
    """Raise UserError unless `name` is a plain relative path: not absolute, no `..`, backslash or control character.

    `root` is the directory that it is relative to, and `where` the file that holds the name; both are for the message.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} names a file {name!r:.100}; a relative path is expected")
    parts = name.split("/")
    longest = max(len(part.encode(errors="surrogatepass")) for part in parts)
    if not {"", ".", ".."}.isdisjoint(parts) or _NOT_IN_NAMES.search(name) or longest > _LONGEST_NAME:
        raise UserError(f"{where} names a file {name!r:.100}, which is not a plain path inside {root}")


def name_inside(root: Path, name: Any, where: Path | str) -> Path:
    """The path of a file that is named in another file: a plain relative path inside `root`, links included.

    `where` is the file that holds the name. Raises UserError for absolute paths, `..`, backslashes, control characters,
    and links that lead out of `root`. The file need not exist.
    """
    require_plain_name(name, root, where)
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"{where} names a file {name!r:.100}, which cannot be found: {describe(error)}") from error
    if not inside:
        raise UserError(f"{where} names a file {name!r:.100}, which a link takes out of {root}")
    return path
