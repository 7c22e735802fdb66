"""Decompression of streams in bounded memory. What precedes damage is yielded before the error is raised."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import zstandard

_OUTPUT_BYTES = 1 << 20  # bytes decompressed at once
_INPUT_BYTES = 1 << 16  # bytes read at once; each may decompress to hundreds
_ZSTD_INPUT_BYTES = 1 << 12  # each block of four bytes may decompress to 128 KiB, and no limit can be given
_GZIP = 16 + zlib.MAX_WBITS  # makes zlib expect a gzip header
_ZSTD_WINDOW = 1 << 31  # window of `zstd --long=31`, the largest
_XZ_MEMORY = 1 << 30  # more than `xz -9` needs


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
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


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """Decompress zstandard frame by frame. The reader of `zstandard` would accept a truncated frame."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, inside = decompressor.decompressobj(), False
    while compressed := file.read(_ZSTD_INPUT_BYTES):
        while compressed:
            inside = True
            yield frame.decompress(compressed)
            compressed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, inside = decompressor.decompressobj(), False
    if inside:
        raise EOFError("the last frame is truncated")


def _by_streams(make: Callable[[], Any]) -> Callable[[IO[bytes]], Iterator[bytes]]:
    """Decompress joined streams with a decompressor of the standard library."""

    def decompress(file: IO[bytes]) -> Iterator[bytes]:
        stream, inside = make(), False
        while compressed := file.read(_INPUT_BYTES):
            compressed = compressed if inside else compressed.lstrip(b"\0")  # padding
            while compressed or (inside and not stream.needs_input):
                inside = True
                yield stream.decompress(compressed, _OUTPUT_BYTES)
                compressed = stream.unused_data.lstrip(b"\0") if stream.eof else b""
                if stream.eof:
                    stream, inside = make(), False
        if inside:
            raise EOFError("the last stream is truncated")

    return decompress


# By the values of `corpus_files.COMPRESSIONS`.
_DECOMPRESS: Mapping[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "gzip": _gunzip,
    "zstd": _unzstd,
    "bzip2": _by_streams(bz2.BZ2Decompressor),
    "xz": _by_streams(lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)),
}


def read_chunks(file: IO[bytes], compression: str | None) -> Iterator[bytes]:
    """Yield the rest of an open file, decompressed. Any exception of a decompressor means damage."""
    if compression is not None:
        yield from _DECOMPRESS[compression](file)
        return
    while chunk := file.read(_OUTPUT_BYTES):
        yield chunk
