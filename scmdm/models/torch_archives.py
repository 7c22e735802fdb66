"""Zip archives of `torch.save`, checked before torch reads them.

torch maps an archive into memory and does not look at its checksums, so that a flipped bit becomes another weight.
Checking them reads the file once, in seconds per gigabyte. The pickle inside is followed symbolically, without making
an object: a few kilobytes of it can otherwise describe values that take hours to hash or print, or that overflow the
stack.
"""

from __future__ import annotations

import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmdm.system.untrusted import DEEPEST, reading, require_regular

_MOST_RECORDS = 2**20
_LARGEST_PICKLE = 2**26  # bytes
_MOST_INSTRUCTIONS = 4_000_000
_MOST_VALUES = 10_000_000  # of one object, shared parts counted as often as they are used
_PICKLE = "/data.pkl"
_ATOMS = frozenset(
    (
        "NONE",
        "NEWFALSE",
        "NEWTRUE",
        "BININT",
        "BININT1",
        "BININT2",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINSTRING",
        "LONG1",
    )
)
_NEW = frozenset(["EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"])
_ATOM: tuple[()] = ()
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class PickledNames:
    """Classes and functions that a pickle names, as in `collections.OrderedDict`."""

    all: frozenset[str]
    mappings: frozenset[str]  # whose instances get items by key, as subclasses of dict do
    sequences: frozenset[str]  # whose instances get items appended, as subclasses of list do


def check_archive(path: Path, what: str, remedy: str) -> PickledNames:
    """Return the names of classes and functions in a zip archive's pickle.

    Raises UserError unless every record is stored whole, once, and has its checksum, and the pickle is bounded.
    """
    with reading(path, what, remedy):
        size = require_regular(path).st_size
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            _check_records(records, size)
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"record {damaged!r} does not match its checksum")
            pickles = [record for record in records if record.filename.endswith(_PICKLE)]
            if len(pickles) != 1:
                raise ValueError(f"{len(pickles)} records named data.pkl")
            return check_pickle(archive.read(pickles[0]))


def _check_records(records: list[zipfile.ZipInfo], size: int) -> None:
    if len(records) > _MOST_RECORDS or len({record.filename for record in records}) != len(records):
        raise ValueError(f"{len(records)} records, some of which have the same name")
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"its records have more bytes than the file, which has {size}")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError(f"record {record.filename!r} is compressed, which torch.save does not do")
        if record.filename.endswith(_PICKLE) and record.file_size > _LARGEST_PICKLE:
            raise ValueError(f"record {record.filename!r} has {record.file_size} bytes")


def check_pickle(data: bytes) -> PickledNames:
    """Return the names of classes and functions in a pickle of protocol 2. Raises ValueError for what is unbounded."""
    names: set[str] = set()
    machine = _Machine()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number > _MOST_INSTRUCTIONS:
            raise ValueError(f"more than {_MOST_INSTRUCTIONS} instructions")
        if opcode.name == "GLOBAL":
            argument = _present_name(*str(argument).split(" ", 1))
            names.add(argument)
        machine.step(opcode.name, argument)
    machine.check_sizes()
    return PickledNames(frozenset(names), frozenset(machine.mappings), frozenset(machine.sequences))


def _present_name(module: str, name: str) -> str:
    """Return a name as Python 3 spells it; protocol 2 writes names of Python 2."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[(module, name)]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


class _Name(tuple[()]):
    """A class or function on the stack."""

    text: str


class _Machine:
    """The stack of an unpickler: containers as lists of their content, names as `_Name`, other values as `_ATOM`."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._made: list[list[Any]] = []
        self._levels: dict[int, int] = {}  # of tuples, by identity
        self._makers: dict[int, str] = {}  # names of what made an object, by its identity
        self.mappings: set[str] = set()
        self.sequences: set[str] = set()

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction. Raises ValueError for one that torch does not write, IndexError on an empty stack."""
        if name in _ATOMS:
            self._stack.append(_ATOM)
        elif name in _NEW:
            self._push([])
        elif name in _TUPLES:
            self._push_tuple(self._pop(_TUPLES[name]))
        elif name == "TUPLE":
            self._push_tuple(self._pop_mark())
        elif name in ("APPENDS", "SETITEMS"):
            self._add(self._pop_mark(), name)
        elif name in ("APPEND", "SETITEM"):
            self._add(self._pop(1 if name == "APPEND" else 2), name)
        elif name == "GLOBAL":
            self._stack.append(maker := _Name())
            maker.text = str(argument)
        elif name in ("REDUCE", "NEWOBJ"):
            maker, _ = self._pop(2)
            self._push([])
            if isinstance(maker, _Name):
                self._makers[id(self._stack[-1])] = maker.text
        elif name == "BINPERSID":
            self._pop(1)
            self._stack.append(_ATOM)
        elif name == "BUILD":
            self._pop(1)
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"instruction {name}, which torch.save does not write")

    def check_sizes(self) -> None:
        """Raise ValueError if a container contains itself, or has too many levels or values."""
        known: dict[int, tuple[int, int]] = {}  # levels and values by identity; (0, 0) while it is computed
        for root in self._made:
            pending = [root]
            while pending:
                value = pending[-1]
                if known.get(id(value), (0, 0)) != (0, 0):
                    pending.pop()
                elif id(value) not in known:
                    known[id(value)] = (0, 0)
                    pending.extend(child for child in value if id(child) not in known)
                    if any(known.get(id(child)) == (0, 0) for child in value):
                        raise ValueError("a container that contains itself")
                else:
                    pending.pop()
                    found = [known[id(child)] for child in value]
                    levels, values = 1 + max((f[0] for f in found), default=0), 1 + sum(f[1] for f in found)
                    if (0, 0) in found or levels > DEEPEST or values > _MOST_VALUES:
                        raise ValueError(f"a container of {levels} levels and {values} values")
                    known[id(value)] = (levels, values)

    def _push(self, value: list[Any]) -> None:
        self._stack.append(value)
        self._made.append(value)

    def _push_tuple(self, value: list[Any]) -> None:
        levels = 1 + max((self._levels.get(id(child), 0) for child in value), default=0)
        if levels > DEEPEST:
            raise ValueError(f"tuples of more than {DEEPEST} levels")
        self._levels[id(value)] = levels
        self._push(value)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("too few values for an instruction")
        found = self._stack[-count:]
        del self._stack[-count:]
        return found

    def _pop_mark(self) -> list[Any]:
        found = self._stack[self._marks[-1] :]
        del self._stack[self._marks.pop() :]
        return found

    def _add(self, values: list[Any], instruction: str) -> None:
        target = self._stack[-1]
        target.extend(values)
        maker = self._makers.get(id(target))
        if maker is not None:
            (self.sequences if instruction.startswith("APPEND") else self.mappings).add(maker)
