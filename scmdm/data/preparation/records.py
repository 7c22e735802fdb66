"""Records of a corpus, and the parts of its files that are read independently of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scmdm.data.tokenizers import Content
from scmdm.errors import UserError

SPLITS = ("train", "validation", "test")  # of every data set, unless positions decide
_LONGEST_PLACE = 300  # characters
PLACES = 3  # places that are kept of each reason


@dataclass(frozen=True)
class Record:
    """One document, molecule, image or window of a sequence."""

    content: Content  # bytes: token values, such as levels of pixels
    label: int | None = None  # index into the source's `labels`
    group: str | None = None  # records of a group share a split, by the hash of the group; None: hash of the content
    prompt: str | None = None  # text before the content that is never masked
    is_chat: bool = False  # the content is a JSON list of the roles and contents of messages

    @property
    def text(self) -> Content:
        """Prompt and content."""
        if self.prompt is None:
            return self.content
        assert isinstance(self.content, str)
        return self.prompt + self.content


@dataclass(frozen=True)
class Slice:
    """Range of a file: of bytes, or of rows or row groups where the format has them.

    `file` is a key of `Source.files()`; `end` None is the end of the file.
    """

    file: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Part:
    """Slices that one worker reads at a time. Parts depend on the corpus alone, not on the number of workers."""

    slices: tuple[Slice, ...]
    split: str | None = None  # one of `Source.published`; None: the hash of each record decides


class Tally:
    """Counts of records read, and of records dropped by reason.

    Args:
        refuse: raise an error for the first unusable record (`on_dirty=refuse`).
        on_read: called with the number of records read so far.
    """

    def __init__(self, *, refuse: bool = False, on_read: Callable[[int], None] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}  # the first few of each reason
        self._refuse, self._on_read = refuse, on_read

    def read(self) -> None:
        """Count a record."""
        self.counts["read"] += 1
        if self._on_read is not None:
            self._on_read(self.counts["read"])

    def drop(self, reason: str, where: object) -> None:
        """Count an unusable record. With `refuse`, raise UserError that names `where` it is.

        `where` may be a function that finds the place, which can take long: it is called only if the place is shown.
        """
        if self._refuse:
            raise UserError(f"{_place(where)}: {reason}; correct it, or skip such records with on_dirty=skip")
        self._show(f"dropped: {reason}", where)
        self.leave_out(reason)

    def note(self, reason: str, where: object) -> None:
        """Count a record that is kept although something about it is worth knowing."""
        self._show(reason, where)
        self.counts[reason] += 1

    def _show(self, reason: str, where: object) -> None:
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES:
            # A path may have bytes that are not UTF-8, which would be lone surrogates.
            shown = _place(where)[:_LONGEST_PLACE].encode(errors="replace").decode()
            places.append(" ".join(shown.split()))

    def leave_out(self, reason: str) -> None:
        """Count an intentional drop, such as a duplicate, which is no error even with `refuse`."""
        self.counts[f"dropped: {reason}"] += 1


def _place(where: object) -> str:
    return str(where() if callable(where) else where)


def cut_bytes(name: str, path: Path, part_bytes: int) -> list[Slice]:
    """Cut a file into ranges of `part_bytes` bytes."""
    found = path.stat().st_size
    return [Slice(name, at, min(at + part_bytes, found)) for at in range(0, found, part_bytes)]


def cut_into_parts(
    files: Mapping[str, Path],
    part_bytes: int,
    divisible: Callable[[Path], bool] | None = None,
    split: str | None = None,
    cut: Callable[[str, Path, int], list[Slice]] = cut_bytes,
) -> list[Part]:
    """Group small files into parts of up to `part_bytes`.

    A larger file is cut with `cut` into one part per slice if it is `divisible`, and forms a part of its own if not.
    """
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
    """Join successive parts of the same split."""
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].split == part.split:
            joined[-1] = Part((*joined[-1].slices, *part.slices), part.split)
        else:
            joined.append(part)
    return joined
