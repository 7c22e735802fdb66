"""What a corpus gives: parts that can be read apart from each other, and clean records from each."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from scmdm.data.tokenizers import Content, Layout
from scmdm.errors import UserError

SPLITS = ("train", "validation", "test")  # what every data set has
_SKIPPED = 1 << 20  # bytes at once


@dataclass(frozen=True)
class Record:
    """One document, molecule, picture or window of a genome."""

    content: Content  # bytes: token values as they are (levels of pixels)
    label: int | None = None  # index into the source's `labels`
    group: str | None = None  # records of one group are in one split, which its hash decides; None: the content's
    prompt: str | None = None  # text that is given before it

    @property
    def text(self) -> Content:
        """All of it."""
        if self.prompt is None:
            return self.content
        assert isinstance(self.content, str)
        return self.prompt + self.content


@dataclass(frozen=True)
class Slice:
    """Bytes of a file (row groups, rows of one whose format has them), by a name that the source knows.

    `end` None: to the end.
    """

    file: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time. Parts depend on the corpus alone, never on the number of workers."""

    slices: tuple[Slice, ...]
    split: str | None = None  # one of the source's `published`; None: every record's split follows from its hash


class Tally:
    """Counts records read and dropped by reason; with `refuse` the first that is to be dropped ends the work."""

    def __init__(self, *, refuse: bool = False, on_read: Callable[[int], None] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._refuse, self._on_read = refuse, on_read

    def read(self) -> None:
        self.counts["read"] += 1
        if self._on_read is not None:
            self._on_read(self.counts["read"])

    def drop(self, reason: str, where: object) -> None:
        """Count what cannot be used. Raises UserError, which names the place, when nothing may be dropped."""
        if self._refuse:
            raise UserError(f"{where}: {reason}; correct it, or leave it out with on_dirty=skip")
        self.leave_out(reason)

    def leave_out(self, reason: str) -> None:
        """Count what is no dirt, and yet not wanted: repetitions, what the settings ask to leave out."""
        self.counts[f"dropped: {reason}"] += 1


class Source(Protocol):
    """One corpus: a module of `data_prep`."""

    name: str
    whole_records: bool  # a record is one sample (a molecule) or is cut into several (text)
    labels: tuple[str, ...]  # names of the classes of records; empty: none

    @property
    def published(self) -> tuple[str, ...]:
        """Splits that its parts name, beyond SPLITS too; empty: all are drawn by hash."""
        ...

    def files(self) -> dict[str, Path]:
        """The raw files by a name that does not depend on where they are, in reading order."""
        ...

    def parts(self, part_bytes: int) -> list[Part]:
        """The corpus in reading order, in parts of about so many bytes."""
        ...

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Clean records of a part in a fixed order, repetitions included; what is left out goes to the tally."""
        ...


@runtime_checkable
class WithLayout(Protocol):
    """A source whose records are bytes: values, as many in each."""

    layout: Layout


def cut_bytes(name: str, path: Path, part_bytes: int) -> list[Slice]:
    """A file in ranges of so many bytes."""
    found = path.stat().st_size
    return [Slice(name, at, min(at + part_bytes, found)) for at in range(0, found, part_bytes)]


def cut_into_parts(
    files: Mapping[str, Path],
    part_bytes: int,
    divisible: Callable[[Path], bool] | None = None,
    split: str | None = None,
    cut: Callable[[str, Path, int], list[Slice]] = cut_bytes,
) -> list[Part]:
    """Small files together, large ones that are `divisible` in the slices that `cut` makes of them, the rest alone."""
    parts: list[Part] = []
    gathered: list[Slice] = []
    size = 0

    def flush() -> None:
        nonlocal size
        if gathered:
            parts.append(Part(tuple(gathered), split))
        gathered.clear()
        size = 0

    for name, path in files.items():
        found = path.stat().st_size
        if size + found > part_bytes:
            flush()
        if found > part_bytes and divisible is not None and divisible(path):
            parts += [Part((piece,), split) for piece in cut(name, path, part_bytes)]
            continue
        gathered.append(Slice(name))
        size += found
    flush()
    return parts


def join_parts(parts: Sequence[Part]) -> list[Part]:
    """As few parts as there are runs of the same split."""
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].split == part.split:
            joined[-1] = Part((*joined[-1].slices, *part.slices), part.split)
        else:
            joined.append(part)
    return joined


def read_lines(path: Path, piece: Slice, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a slice, each with its offset: slices that touch share nothing and miss nothing.

    Of a line of more than `longest` bytes come the first `longest` and one. A byte order mark is no part of a line.
    """
    with open(path, "rb") as file:
        at = piece.start
        if at > 0:
            file.seek(at - 1)
            at += _skip_line(file) - 1
        while piece.end is None or at < piece.end:
            line = file.readline() if longest is None else file.readline(longest + 1)
            if not line:
                return
            size = len(line)
            if longest is not None and size > longest and not line.endswith(b"\n"):
                size += _skip_line(file)
            yield at, line.removeprefix(codecs.BOM_UTF8) if at == 0 else line
            at += size


def _skip_line(file: BinaryIO) -> int:
    """Go behind the end of the line; returns how many bytes that were."""
    size = 0
    while rest := file.readline(_SKIPPED):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
    return size
