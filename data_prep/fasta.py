"""FASTA files of nucleotides or amino acids, compressed or not."""

from __future__ import annotations

import mmap
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

from data_prep.corpus_files import FoundFiles, NamedFiles, find_files
from data_prep.text_files import TextFile
from scmdm.data.preparation.records import Part, Slice, Tally, cut_into_parts
from scmdm.data.preparation.source import Source

WHITE_SPACE = b" \t\r\n\v\f"
_BEFORE_HEADER = b" \t" + BOM_UTF8[:1]
_LONGEST_HEADER = 1 << 16  # bytes; the rest of a longer one is not looked at


class FastaSource(NamedFiles, Source):
    """Base of sources of FASTA: one file, or all FASTA files below a folder, sorted by path.

    Raises UserError when there are none.
    """

    formats: ClassVar[tuple[str, ...]]  # values of `corpus_files.SUFFIXES`

    def __init__(self, path: Path, split_by: str = "hash", name: str | None = None) -> None:
        self.path, self.name, self._split_by = path, name or path.name, split_by

    def _find(self) -> FoundFiles:
        return find_files(self.path, self.formats)

    def _cut(self, files: dict[str, Path], split: str | None, part_bytes: int) -> list[Part]:
        """Group small files, and divide large uncompressed files between sequences."""
        whole = cut_into_parts(files, part_bytes, split=split)
        return [part for group in whole for part in _by_sequence(group, files, part_bytes)]

    def _sequences(self, part: Part, tally: Tally) -> Iterator[tuple[str, str, Iterator[bytes]]]:
        """Yield file name, id and raw lines of each sequence of a part; drop files that are damaged or not FASTA."""
        for piece in part.slices:
            path = self._found.files[piece.file]
            if piece.start == 0 and (damage := find_damage(path)) is not None:
                tally.drop(*damage)
                continue
            file = TextFile(path)
            for (number, identifier), lines in groupby(_read_fasta(file, piece), key=itemgetter(0)):
                if number == 0:
                    tally.drop("not FASTA", f"{path}: letters before the first line that begins with >")
                    continue
                yield piece.file, identifier, (line for _, line in lines)
            if file.problem is not None:
                tally.drop(file.problem.reason, file.problem.where)


def find_damage(path: Path) -> tuple[str, str] | None:
    """Return the reason and place where a file cannot be used, or None.

    Compressed files are read to the checksum at their end. A part that does not begin with its file is not looked at.
    """
    file, start = TextFile(path), b""
    for chunk in file.chunks():
        start = start or chunk.lstrip()
        if start and file.is_divisible:
            break
    if file.problem is not None:
        return file.problem.reason, file.problem.where
    if not start:
        return "empty file", str(path)
    return (
        None if start.startswith((b">", b";")) else ("not FASTA", f"{path}: it begins with {start[:20]!r}, not with >")
    )


def _read_fasta(file: TextFile, piece: Slice) -> Iterator[tuple[tuple[int, str], bytes]]:
    """Yield number and id (first word of the header) of a sequence with each line: an empty one, then its letters.

    Letters before the first header have the number 0. White space or a byte order mark may precede a header.

    Lines that begin with `;` are comments. A line may come in several pieces, for it may be a whole chromosome.
    """
    sequence, header, in_comment, at, line_begins = (0, ""), b"", False, piece.start or file.mark, True
    for chunk in file.chunks(piece.start):
        for raw in chunk.splitlines(keepends=True):
            line = raw
            if line_begins:
                if raw[:1] in _BEFORE_HEADER:
                    line = raw.lstrip(b" \t").removeprefix(BOM_UTF8)
                if piece.end is not None and at >= piece.end:
                    return
                in_comment, header = line.startswith(b";"), line if line.startswith(b">") else b""
            elif header:
                header = (header + line)[:_LONGEST_HEADER]
            at += len(raw)
            line_begins = raw.endswith((b"\n", b"\r"))
            if header and line_begins:
                sequence, header = (sequence[0] + 1, _identifier(header)), b""
                yield sequence, b""
            elif not header and not in_comment and (sequence[0] > 0 or line.strip()):
                yield sequence, line
    if header:
        yield (sequence[0] + 1, _identifier(header)), b""


def _identifier(header: bytes) -> str:
    return (header[1:].split() or [b""])[0].decode(errors="replace")


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
    if len(part.slices) > 1 or path.stat().st_size <= part_bytes or not TextFile(path).is_divisible:
        return [part]
    cuts = [0]
    for start in _sequence_starts(path):
        if start - cuts[-1] >= part_bytes:
            cuts.append(start)
    return [
        Part((Slice(first.file, start, end),), part.split) for start, end in zip(cuts, [*cuts[1:], None], strict=True)
    ]


def _sequence_starts(path: Path) -> Iterator[int]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(b"\n>")
        while at >= 0:
            yield at + 1
            at = content.find(b"\n>", at + 1)
