"""Configuration keys: default, help text and rules of a key are declared together, with its field.

A configuration is a dataclass whose fields are declared with `key`. Validation, `--help`, the check of a resumed run
and the check of an adaptation against its base all read the field's metadata.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from scmdm.config.registry import Registry
from scmdm.errors import UserError

_METADATA = "scmdm.key"
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST_PATH, _LONGEST_NAME = 4_000, 255  # bytes that Linux allows, less room for names below a directory
_PATH_WANTED = (
    f"a path in UTF-8 without control characters, not empty, of at most {_LONGEST_PATH} bytes and {_LONGEST_NAME} in "
    "a name"
)
_LONGEST_VALUE = 120  # characters of a value in a message
_WIDTH, _TEXT_COLUMN = 120, 47  # width of a line of `--help`, and column of its text


class PathKind(Enum):
    """Whether a path is read or written. Inputs may be named as `configs/...`, see `scmdm.config.shipped`."""

    INPUT = "input"
    OUTPUT = "output"


class OnAdapt(Enum):
    """What an adaptation may do with a key of its base's model."""

    FROM_BASE = "taken from the base"
    CONDITIONER = "settable if the base has no conditioner"
    OWN = "settable"


@dataclass(frozen=True)
class Key:
    """Rules of one key.

    Bounds apply to numbers, and to each element of a list of numbers. `None` is accepted exactly where the field's type
    is optional.
    """

    help: str
    choices: tuple[str, ...] = ()  # empty: any value
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    on_resume: bool = False  # may change when a run is resumed
    on_adapt: OnAdapt = OnAdapt.FROM_BASE
    registry: Registry | None = None  # for a section: classes by the name that the key `selector` holds
    selector: str = "name"
    path: PathKind | None = None  # the text is the path of a file or directory
    free_text: bool = False  # on the command line, `null` is a text as well
    keys_of: str = ""  # of a mapping: the registry, as `module:NAME`, whose classes declare its keys, for `--help`
    formerly: tuple[str, ...] = ()  # earlier names, dotted from the root: they are refused with the present name

    def wanted(self, value: object = None) -> str:
        """Describe the allowed values, as in `between 0 and 1` or `above 0`; `value` is one that is not allowed."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if isinstance(value, str):
            return _PATH_WANTED if self.path is not None else "text of valid characters, without NUL"
        if self.at_least is not None and self.at_most is not None:
            return f"between {_number(self.at_least)} and {_number(self.at_most)}"
        bounds = (
            ("at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        given = [f"{name} {_number(bound)}" for name, bound in bounds if bound is not None]
        return " and ".join(given) or "a finite number"

    def allows(self, value: object) -> bool:
        """Return whether a value that is not None satisfies choices and bounds. Numbers must be finite."""
        if isinstance(value, list | tuple):
            return all(not isinstance(element, list | tuple | dict) and self.allows(element) for element in value)
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return is_path(value) if self.path is not None else is_text(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            not (isinstance(value, float) and not math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def is_text(value: str) -> bool:
    """Return whether text can be written to a file and given to the system: no NUL, no half of a surrogate pair."""
    return "\0" not in value and not _SURROGATE.search(value)


def is_path(value: str) -> bool:
    """Return whether text can be the path of a file or directory."""
    return (
        bool(value.strip())
        and is_text(value)
        and not _CONTROL.search(value)
        and len(value.encode()) <= _LONGEST_PATH
        and all(len(name.encode()) <= _LONGEST_NAME for name in value.split("/"))
    )


def _number(bound: float) -> str:
    if not float(bound).is_integer():
        return f"{bound:g}"
    whole = int(bound)
    power = whole.bit_length() - 1
    return f"2^{power}" if power >= 20 and whole == 2**power else str(whole)


def key(default: Any = dataclasses.MISSING, *, help: str, factory: Any = dataclasses.MISSING, **rules: Any) -> Any:
    """Declare a configuration key: a dataclass field with its default, its help text and its rules.

    `rules` are fields of `Key`. With `registry` the field is a section whose class depends on the name that the user
    gives under `selector`; `factory` makes the section when the user gives none.
    """
    metadata = {_METADATA: Key(help, **rules)}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def rules_of(field: dataclasses.Field[Any]) -> Key | None:
    """Return the rules of a field that `key` declared; None for a section or a plain field."""
    return field.metadata.get(_METADATA)


def walk_keys(config: object, prefix: str = "") -> Iterator[tuple[str, Key, Any]]:
    """Yield dotted name, rules and value of every key of a configuration and its sections, in declaration order."""
    assert dataclasses.is_dataclass(config)
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        rules = rules_of(field)
        if rules is not None:
            yield name, rules, value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from walk_keys(value, f"{name}.")
        elif isinstance(value, dict):
            for part, section in value.items():
                if dataclasses.is_dataclass(section) and not isinstance(section, type):
                    yield from walk_keys(section, f"{name}.{part}.")


def section_of(field: dataclasses.Field[Any]) -> type | None:
    """Return the dataclass of a section, with a registry that of the default; None for a key."""
    factory = field.default_factory
    rules = rules_of(field)
    if rules is not None and rules.registry is not None and factory is not dataclasses.MISSING:
        return type(factory())
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def walk_fields(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield dotted name and field of every key of a configuration class and its sections, in declaration order."""
    for field in dataclasses.fields(schema):
        section = section_of(field)
        if section is None:
            yield f"{prefix}{field.name}", field
        else:
            yield from walk_fields(section, f"{prefix}{field.name}.")


@functools.cache
def replaced_keys(schema: type) -> Mapping[str, str]:
    """Return the remedy for each renamed or removed key, as in `write metrics.fcd`.

    Renamed keys are declared with `key(formerly=...)`, removed ones in the class attribute `removed_keys` of `schema`,
    a mapping from the dotted name to the remedy.
    """
    renamed = {old: f"write `{name}`" for old, name in renamed_keys(schema).items()}
    return dict(getattr(schema, "removed_keys", {})) | renamed


def renamed_keys(schema: type) -> dict[str, str]:
    """Map each former name of a key to its present name, both dotted from the root of the configuration."""
    fields = dict(walk_fields(schema))
    found = {}
    for name, field in fields.items():
        rules = rules_of(field)
        for old in rules.formerly if rules is not None else ():
            if old not in fields:  # a key may have the former name of another one
                found[old] = name
    return found


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raise UserError, which names the allowed values, unless `condition` holds."""
    if not condition:
        raise UserError(f"{name}={shorten(value)} is not possible; it must be {wanted}")


def shorten(value: object) -> str:
    """Return the `repr` of a value, truncated for a message; booleans and null as in YAML."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "(an integer of thousands of digits)"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def validate_keys(config: object) -> None:
    """Raise UserError for the first key whose value its rules do not allow."""
    for name, rules, value in walk_keys(config):
        require(value is None or rules.allows(value), name, value, rules.wanted(value))


def describe_keys(schema: type) -> str:
    """List the keys of a configuration class for `--help`, each with its default, help text and choices.

    For a section whose class depends on a name, the keys that all names share come first, then those of each name.
    """
    return "\n".join(_lines(dataclasses.fields(schema), ""))


def _lines(fields: Iterable[dataclasses.Field[Any]], prefix: str) -> Iterator[str]:
    for field in fields:
        rules, section = rules_of(field), section_of(field)
        if rules is not None and rules.registry is not None:
            yield from _lines_by_name(rules, rules.registry, section, f"{prefix}{field.name}.")
        elif section is not None:
            yield from _lines(dataclasses.fields(section), f"{prefix}{field.name}.")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield _line(f"{prefix}{field.name}", default, _help(rules))
            if rules is not None and rules.keys_of:
                yield from _lines_of_mapping(rules.keys_of, f"{prefix}{field.name}.")


def _lines_by_name(rules: Key, registry: Registry, default: type | None, prefix: str) -> Iterator[str]:
    selected = getattr(default, rules.selector, MISSING)
    yield _line(f"{prefix}{rules.selector}", selected, f"{rules.help} [{' | '.join(registry.names)}]")
    fields = {name: _fields_by_name(registry, name, rules.selector) for name in registry.names}
    known = [found for found in fields.values() if found is not None]
    first = known[0] if len(known) > 1 else {}
    shared = {name for name, field in first.items() if all(_same(field, other.get(name)) for other in known)}
    yield from _lines((first[name] for name in first if name in shared), prefix)
    for name, own in fields.items():
        yield f"  with {prefix}{rules.selector}={name}:"
        yield from _own_lines(own, shared, prefix) or ["    (no other keys)"]


def _lines_of_mapping(registry_name: str, prefix: str) -> Iterator[str]:
    """The keys that each class of a registry declares for a mapping; classes without keys are left out."""
    module, _, attribute = registry_name.partition(":")
    registry: Registry = getattr(importlib.import_module(module), attribute)
    for name in registry.names:
        lines = _own_lines(_fields_by_name(registry, name, ""), set(), prefix)
        yield from (f"  of the {registry.key} {name}:", *lines) if lines else ()


def _own_lines(own: dict[str, dataclasses.Field[Any]] | None, shared: set[str], prefix: str) -> list[str]:
    if own is None:
        return ["    (a required package is not installed; see `scmdm doctor`)"]
    own_lines = _lines((own[key] for key in own if key not in shared), prefix)
    return [textwrap.indent(line, "  ") for line in own_lines]


def _fields_by_name(registry: Registry, name: str, selector: str) -> dict[str, dataclasses.Field[Any]] | None:
    """Return the fields of the class of `name` except for the selector; None when a package is missing."""
    try:
        schema = registry.schema(name)
    except ImportError:
        return None
    return {field.name: field for field in dataclasses.fields(schema) if field.name != selector}


def _same(one: dataclasses.Field[Any], other: dataclasses.Field[Any] | None) -> bool:
    return other is not None and rules_of(one) == rules_of(other) and one.default == other.default


def _line(name: str, default: object, text: str) -> str:
    """Format `  name=default   text`, with the text wrapped in its own column."""
    start = f"  {f'{name}={_format_default(default)}':<{_TEXT_COLUMN - 3}} "
    wrapped = textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=" " * _TEXT_COLUMN)
    return (wrapped if text else start).rstrip()


def _help(rules: Key | None) -> str:
    if rules is None:
        return ""
    return f"{rules.help} [{' | '.join(rules.choices)}]" if rules.choices else rules.help


def _format_default(default: object) -> str:
    return {"???": "required", "None": "null", "True": "true", "False": "false"}.get(str(default), str(default))
