"""Packed files, line by line, in bounded memory. A damaged one gives what is whole before the damage."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from scmdm.system.package_data import optional

_UNPACKED = 1 << 20  # bytes unpacked at once
_PACKED = 1 << 16  # packed bytes read at once, each of which may unpack to hundreds
_GZIP = 16 + zlib.MAX_WBITS  # with gzip's own header
_ZSTD_WINDOW = 1 << 31  # the largest that `zstd --long=31` writes

Unpack = Callable[[IO[bytes]], Iterator[bytes]]  # bytes of a file; EOFError or OSError for damage


class PackedLines:
    """The lines of a packed file, each with its place; of one of more than `longest` bytes come the first `longest` and
    one. A byte order mark is no part of a line, and a line that damage cuts off is left out."""

    def __init__(self, path: Path, unpack: Unpack, longest: int) -> None:
        self._path, self._unpack, self._longest = path, unpack, longest
        self.damage: str | None = None  # known at the end: where, and what

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        number, rest, first = 0, b"", True
        try:
            with open(self._path, "rb") as file:
                for chunk in self._unpack(file):
                    if first and chunk:
                        chunk, first = chunk.removeprefix(codecs.BOM_UTF8), False
                    *whole, rest = (rest + chunk).split(b"\n")
                    for number, line in enumerate(whole, number + 1):  # noqa: B020 (goes on counting)
                        yield f"{self._path}, line {number}", line[: self._longest] + b"\n"
                    rest = rest[: self._longest + 1]
        except (EOFError, OSError, zlib.error) as error:
            self.damage = f"{self._path} behind line {number} ({' '.join(str(error).split())})"
            return
        if rest:
            yield f"{self._path}, line {number + 1}", rest


def gunzipped(file: IO[bytes]) -> Iterator[bytes]:
    """Member by member: `gzip` gives nothing of the read in which it meets the damage."""
    member, inside = zlib.decompressobj(_GZIP), False
    while packed := file.read(_PACKED):
        # Zeros may stand behind a member, up to the end of a tape's block.
        while packed := packed if inside else packed.lstrip(b"\0"):
            yield member.decompress(packed, _UNPACKED)
            packed, inside = (member.unused_data, False) if member.eof else (member.unconsumed_tail, True)
            if not inside:
                member = zlib.decompressobj(_GZIP)
    if inside:
        yield member.flush()
        if not member.eof:
            raise EOFError("the last member is cut off")


def unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader takes the end of the file for the end of a frame that was cut."""
    zstandard = optional("zstandard", f"{getattr(file, 'name', 'a .zst file')}")
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, inside = unpacker.decompressobj(), False
    while packed := file.read(_PACKED):
        while packed:
            inside = True
            try:
                yield frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            packed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, inside = unpacker.decompressobj(), False
    if inside:
        raise EOFError("the last frame is cut off")
