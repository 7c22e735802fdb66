"""FASTA files of nucleotides or amino acids, also gzipped."""

from __future__ import annotations

import gzip
import mmap
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, ClassVar, cast

from scmdm.data.preparation.records import Part, Slice, Tally, cut_into_parts
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError

WHITE_SPACE = b" \t\r\n\v\f"
_READ = 1 << 20  # bytes read at once, because a line may be a whole chromosome


class FastaSource(Source):
    """Base of sources of FASTA: one file, or all FASTA files below a folder, sorted by path.

    Raises UserError when there are none.
    """

    suffixes: ClassVar[tuple[str, ...]]  # suffixes of FASTA files in a folder, each also with .gz

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or path.name

    def files(self) -> dict[str, Path]:
        """FASTA files by path below the folder."""
        return self._fasta()

    def _fasta(self) -> dict[str, Path]:
        if self.path.is_file():
            return {self.path.name: self.path}
        if not self.path.is_dir():
            raise UserError(f"source.path={self.path} does not exist; give a FASTA file or a folder of them")
        files = sorted(path for path in self.path.rglob("*") if self._suffix().search(path.name) and path.is_file())
        if not files:
            raise UserError(
                f"source.path={self.path} holds no {', '.join(self.suffixes)}, gzipped or not; give a folder that does"
            )
        return {str(path.relative_to(self.path)): path for path in files}

    def _suffix(self) -> re.Pattern[str]:
        return re.compile(rf"({'|'.join(map(re.escape, self.suffixes))})(\.gz)?$", re.IGNORECASE)

    def parts(self, part_bytes: int) -> list[Part]:
        """Group small files, and divide large uncompressed files between sequences."""
        fasta = self._fasta()
        return [part for whole in cut_into_parts(fasta, part_bytes) for part in _by_sequence(whole, fasta, part_bytes)]

    def _sequences(self, part: Part, tally: Tally) -> Iterator[tuple[str, str, Iterator[bytes]]]:
        """Yield file name, id and raw lines of each sequence of a part; drop files that are damaged or not FASTA."""
        fasta = self._fasta()
        for piece in part.slices:
            damage = find_damage(fasta[piece.file]) if piece.start == 0 else None
            if damage is not None:
                tally.drop(damage, fasta[piece.file])
                continue
            for (_, identifier), lines in groupby(_read_fasta(fasta[piece.file], piece), key=itemgetter(0)):
                yield piece.file, identifier, (line for _, line in lines)


def find_damage(path: Path) -> str | None:
    """Return why a file cannot be used, or None. Gzipped files are read to the checksum at their end."""
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
    """Yield number and id (first word of the header) of a sequence with each line: an empty one, then its letters."""
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
            elif sequence[0] > 0:  # only blank lines precede the first header
                yield sequence, line


def blocks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Join pieces and cut them into blocks of `size` bytes; the last block may be shorter."""
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
