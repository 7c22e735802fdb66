"""Lines of compressed files, read in bounded memory; a damaged file is read up to the damage."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from scmdm.system.package_data import optional

_OUTPUT_BYTES = 1 << 20  # bytes decompressed at once
_INPUT_BYTES = 1 << 16  # bytes read at once; each may decompress to hundreds
_GZIP = 16 + zlib.MAX_WBITS  # makes zlib expect a gzip header
_ZSTD_WINDOW = 1 << 31  # window of `zstd --long=31`, the largest

Decompress = Callable[[IO[bytes]], Iterator[bytes]]  # raises EOFError, OSError or zlib.error for damage


class CompressedLines:
    """Iterable of the lines of a compressed file, each with a description of its place.

    A line of more than `longest` bytes is cut after `longest + 1`. A leading byte order mark is removed. An incomplete
    line before damage is dropped.
    """

    def __init__(self, path: Path, decompress: Decompress, longest: int) -> None:
        self._path, self._decompress, self._longest = path, decompress, longest
        self.damage: str | None = None  # place and reason; set at the end of the iteration

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        number, rest, first = 0, b"", True
        try:
            with open(self._path, "rb") as file:
                for chunk in self._decompress(file):
                    if first and chunk:
                        chunk, first = chunk.removeprefix(codecs.BOM_UTF8), False
                    *whole, rest = (rest + chunk).split(b"\n")
                    for number, line in enumerate(whole, number + 1):  # noqa: B020 (continues the count)
                        yield f"{self._path}, line {number}", line[: self._longest] + b"\n"
                    rest = rest[: self._longest + 1]
        except (EOFError, OSError, zlib.error) as error:
            self.damage = f"{self._path} after line {number} ({' '.join(str(error).split())})"
            return
        if rest:
            yield f"{self._path}, line {number + 1}", rest


def gunzip(file: IO[bytes]) -> Iterator[bytes]:
    """Decompress gzip member by member. `gzip.open` would lose the bytes of the read in which it finds damage."""
    member, inside = zlib.decompressobj(_GZIP), False
    while compressed := file.read(_INPUT_BYTES):
        # Tape archives pad a member with zeros to the end of a block.
        while compressed := compressed if inside else compressed.lstrip(b"\0"):
            yield member.decompress(compressed, _OUTPUT_BYTES)
            compressed, inside = (member.unused_data, False) if member.eof else (member.unconsumed_tail, True)
            if not inside:
                member = zlib.decompressobj(_GZIP)
    if inside:
        yield member.flush()
        if not member.eof:
            raise EOFError("the last member is truncated")


def unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """Decompress zstandard frame by frame. The reader of `zstandard` would accept a truncated frame."""
    zstandard = optional("zstandard", str(getattr(file, "name", "a .zst file")), "text")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, inside = decompressor.decompressobj(), False
    while compressed := file.read(_INPUT_BYTES):
        while compressed:
            inside = True
            try:
                yield frame.decompress(compressed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            compressed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, inside = decompressor.decompressobj(), False
    if inside:
        raise EOFError("the last frame is truncated")
