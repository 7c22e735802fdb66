"""Genomes: windows of FASTA files with their species.

A window has as many letters as a sample has ids beside [BOS] and [EOS], so that every sample is full. Windows are cut
within blocks of a sequence, and a block is in one split: windows of different splits never share a letter, whatever the
stride. What is left of a sequence behind its last whole window is not used. Give one strain of a species: blocks of two
strains that are alike but for a few letters fall into different splits.
"""

from __future__ import annotations

import gzip
import mmap
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, cast

from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts
from scmdm.errors import UserError

_FASTA = re.compile(r"\.(fa|fasta|fna)(\.gz)?$", re.IGNORECASE)
_READ = 1 << 20  # bytes at once: a line may be a whole chromosome
_KNOWN, _AMBIGUOUS = b"ACGTU", b"RYSWKMBDHVN"  # IUPAC's letters; U is RNA's T
_ALPHABET = b"ACGTN"
_COMPLEMENT = bytes.maketrans(_ALPHABET, b"TGCAN")
_SPACE = b" \t\r\n\v\f"


@dataclass(frozen=True)
class Windows:
    """How sequences are cut. Blocks of `per_block * letters` lie end to end, and windows begin every `stride` in them.

    Letters of IUPAC's code other than A, C, G, T and U (read as T) become N; a window with a larger fraction of N than
    `max_unknown` is left out.
    """

    letters: int
    stride: int | None = None  # None: windows lie end to end
    per_block: int = 64
    max_unknown: float = 0.05
    soft_masked_unknown: bool = False  # lower case becomes N instead of upper case
    reverse_complement: bool = False  # each window also as the other strand reads it

    def of_block(self, block: bytes) -> Iterator[tuple[int, bytes]]:
        """Windows that lie in the block as a whole, each with its offset."""
        for at in range(0, len(block) - self.letters + 1, self.stride or self.letters):
            yield at, block[at : at + self.letters]

    def translation(self) -> bytes:
        """A table for `bytes.translate` from a file's letters to A, C, G, T, N; what is no nucleotide stays."""
        upper = b"ACGTT" + b"N" * len(_AMBIGUOUS)
        lower = b"N" * len(upper) if self.soft_masked_unknown else upper
        letters = _KNOWN + _AMBIGUOUS
        return bytes.maketrans(letters + letters.lower(), upper + lower)


@dataclass(frozen=True)
class Labels:
    """Where a sequence's species comes from; with neither, records have no label."""

    by: str | None = None  # "file": its name without .fa.gz and the like; "folder": the one directly below the path
    table: Path | None = None  # lines of file name or sequence id, tab, species


class Genomes:
    """All FASTA files below a folder, or one, sorted by path; also gzipped.

    Raises UserError when there is none, and when a file or a sequence has no species though labels are asked for.
    """

    whole_records = True
    published: tuple[str, ...] = ()

    def __init__(self, path: Path, windows: Windows, labels: Labels | None = None, name: str | None = None) -> None:
        self.path, self.windows, self.name = path, windows, name or path.name
        self._by, self._table = (labels.by, labels.table) if labels else (None, None)
        self._species_of = read_species_table(self._table) if self._table else {}
        species = self._species_of.values() if self._table else map(self._species_of_file, self._fasta())
        self.labels = tuple(sorted({name for name in species if name is not None}))
        self._label_of = {name: index for index, name in enumerate(self.labels)}

    def files(self) -> dict[str, Path]:
        """FASTA files by path below the folder, and the table of species."""
        return self._fasta() | ({self._table.name: self._table} if self._table else {})

    def _fasta(self) -> dict[str, Path]:
        if self.path.is_file():
            return {self.path.name: self.path}
        if not self.path.is_dir():
            raise UserError(f"path={self.path} does not exist; give a FASTA file or a folder of them")
        files = sorted(path for path in self.path.rglob("*") if _FASTA.search(path.name) and path.is_file())
        if not files:
            raise UserError(f"path={self.path} holds no .fa, .fasta or .fna, gzipped or not; give a folder that does")
        return {str(path.relative_to(self.path)): path for path in files}

    def parts(self, part_bytes: int) -> list[Part]:
        """Small files together; large ones that are not compressed in runs of whole sequences."""
        fasta = self._fasta()
        return [part for whole in cut_into_parts(fasta, part_bytes) for part in _by_sequence(whole, fasta, part_bytes)]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Windows of A, C, G, T, N. Damaged files, what is no FASTA and windows with other letters are dirt."""
        fasta = self._fasta()
        for piece in part.slices:
            damage = find_damage(fasta[piece.file]) if piece.start == 0 else None
            if damage is not None:
                tally.drop(damage, fasta[piece.file])
                continue
            for (_, identifier), pieces in groupby(_read_fasta(fasta[piece.file], piece), key=itemgetter(0)):
                label = self._label(piece.file, identifier)
                letters = (letters for _, letters in pieces)
                yield from self._windows(letters, identifier, label, fasta[piece.file], tally)

    def _windows(
        self, letters: Iterable[bytes], identifier: str, label: int | None, path: Path, tally: Tally
    ) -> Iterator[Record]:
        table, size = self.windows.translation(), self.windows.letters * self.windows.per_block
        clean = (piece.translate(table, _SPACE) for piece in letters)
        number, block = -1, b""
        for number, block in enumerate(_blocks(clean, size)):
            for at, window in self.windows.of_block(block):
                tally.read()
                where = f"{path}: {identifier} at letter {number * size + at + 1}"
                if self._is_usable(window, where, tally):
                    yield from self._strands(window, label, f"{identifier}:{number}", tally)
        if number <= 0 and len(block) < self.windows.letters:
            tally.leave_out("sequence shorter than a window")

    def _is_usable(self, window: bytes, where: str, tally: Tally) -> bool:
        foreign = window.translate(None, _ALPHABET)
        if foreign:
            tally.drop("no nucleotide", f"{where}, {chr(foreign[0])!r}")
            return False
        if window.count(b"N") > self.windows.max_unknown * len(window):
            tally.leave_out("too many unknown letters")
            return False
        return True

    def _strands(self, window: bytes, label: int | None, group: str, tally: Tally) -> Iterator[Record]:
        yield Record(window.decode(), label, group)
        if self.windows.reverse_complement:
            tally.read()
            yield Record(window.translate(_COMPLEMENT)[::-1].decode(), label, group)

    def _label(self, file: str, identifier: str) -> int | None:
        if self._table is None:
            species = self._species_of_file(file)
            return None if species is None else self._label_of[species]
        for key in (identifier, file, Path(file).name):
            if key in self._species_of:
                return self._label_of[self._species_of[key]]
        raise UserError(
            f"species_table={self._table} names neither the sequence {identifier!r} nor its file {file}; add a line"
        )

    def _species_of_file(self, file: str) -> str | None:
        if self._by == "file":
            return _FASTA.sub("", Path(file).name)
        if self._by == "folder" and len(Path(file).parts) == 1:
            raise UserError(
                f"species_from=folder, but {self.path / file} is in no folder below path={self.path}; "
                "make a folder for each species"
            )
        return Path(file).parts[0] if self._by == "folder" else None


def read_species_table(path: Path) -> dict[str, str]:
    """Species by file name or sequence id, from lines of two columns; `#` begins a comment, blank lines are skipped.

    Raises UserError for a missing file, a line of another form, and a name with two species.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"species_table={path} cannot be read: {error}; give a text file") from error
    species: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 2 or not all(columns):
            raise UserError(f"{path}, line {number}: {line[:80]!r}; expected file name or sequence id, tab, species")
        if species.setdefault(columns[0], columns[1]) != columns[1]:
            raise UserError(f"{path}, line {number}: {columns[0]!r} has another species above; leave one of the two")
    if not species:
        raise UserError(f"{path} names no species; write lines of file name or sequence id, tab, species")
    return species


def find_damage(path: Path) -> str | None:
    """Why a file cannot be used, else None. A gzipped one is read to its end: only there its checksum is."""
    try:
        with _open(path) as file:
            start = file.read(_READ).lstrip()
            if path.suffix.lower() == ".gz":
                while file.read(_READ):
                    pass
    except EOFError:
        return "truncated gzip"
    except (gzip.BadGzipFile, zlib.error):
        return "damaged gzip"
    if not start:
        return "empty file"
    return None if start.startswith(b">") else "not FASTA"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else open(path, "rb")


def _read_fasta(path: Path, piece: Slice) -> Iterator[tuple[tuple[int, str], bytes]]:
    """Number and id (the first word of the header) of each sequence, with its letters in pieces; the first is empty."""
    sequence, at, line_begins = (0, ""), piece.start, True
    with _open(path) as file:
        file.seek(piece.start)
        while (piece.end is None or at < piece.end) and (line := file.readline(_READ)):
            at += len(line)
            is_header = line_begins and line.startswith(b">")
            line_begins = line.endswith(b"\n")
            if is_header:
                identifier = (line[1:].split() or [b""])[0].decode(errors="replace")
                sequence = (sequence[0] + 1, identifier)
                yield sequence, b""
            elif sequence[0] > 0:  # before the first header there are only blank lines
                yield sequence, line


def _blocks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The pieces joined and cut anew; the last block may be shorter."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)


def _by_sequence(part: Part, files: dict[str, Path], part_bytes: int) -> list[Part]:
    first = part.slices[0]
    path = files[first.file]
    if len(part.slices) > 1 or path.suffix.lower() == ".gz" or path.stat().st_size <= part_bytes:
        return [part]
    cuts = [0]
    for start in _sequence_starts(path):
        if start - cuts[-1] >= part_bytes:
            cuts.append(start)
    return [Part((Slice(first.file, start, end),)) for start, end in zip(cuts, [*cuts[1:], None], strict=True)]


def _sequence_starts(path: Path) -> Iterator[int]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(b"\n>")
        while at >= 0:
            yield at + 1
            at = content.find(b"\n>", at + 1)
