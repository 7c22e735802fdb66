"""SHA-256 of files: of a whole file up to a chunk's size, and of each chunk of a larger one.

Chunks let several processes verify one file together, and let a reader verify only the part of a file that it uses.
`COUNTS` adds up the bytes that this process has hashed, for tests and benchmarks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

CHUNK_BYTES = 2**23
_BUFFER = 2**20  # bytes


@dataclass
class HashCounts:
    """Bytes that this process has hashed."""

    read: int = 0  # read from files
    written: int = 0  # while they were written


COUNTS = HashCounts()


@dataclass(frozen=True)
class FileHash:
    """Size and hash of a file."""

    bytes: int
    sha256: str | list[str]  # a list, one per chunk, of a file of more than one chunk


def hash_range(path: Path, begin: int, end: int, on_bytes: Callable[[int], object] = lambda _: None) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes from `begin` up to `end`; `on_bytes` is called as they are read.

    A file that ends before `end` has the hash of what it holds.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_BUFFER, max(1, end - begin))))
    with open(path, "rb", buffering=0) as file:
        if begin:
            file.seek(begin)
        left = end - begin
        while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
            digest.update(buffer[:count])
            COUNTS.read += count
            left -= count
            on_bytes(count)
    return digest.hexdigest()


def chunk_ends(size: int, chunk: int) -> list[tuple[int, int]]:
    """Return begin and end of each chunk of a file of `size` bytes; an empty file has one empty chunk."""
    return [(begin, min(begin + chunk, size)) for begin in range(0, max(size, 1), chunk)]


def hash_file(path: Path, chunk: int) -> FileHash:
    """Hash a file."""
    size = path.stat().st_size
    hashes = [hash_range(path, begin, end) for begin, end in chunk_ends(size, chunk)]
    return FileHash(size, hashes if len(hashes) > 1 else hashes[0])


class HashingFile:
    """A new file that is hashed while it is written, and flushed to the disk when the block ends."""

    def __init__(self, path: Path, chunk: int = CHUNK_BYTES) -> None:
        self._path, self._chunk = path, chunk
        self._hashes: list[str] = []
        self._digest, self._in_chunk, self._size = hashlib.sha256(), 0, 0

    def __enter__(self) -> HashingFile:
        self._file = open(self._path, "xb", buffering=0)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises OSError when the disk is full."""
        view = memoryview(data)
        assert view.itemsize == 1
        while len(view):
            part = view[: min(_BUFFER, self._chunk - self._in_chunk)]
            count = self._file.write(part)
            self._digest.update(part[:count])
            COUNTS.written += count
            self._size += count
            self._in_chunk += count
            if self._in_chunk == self._chunk:
                self._end_chunk()
            view = view[count:]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                os.fsync(self._file.fileno())
                self._stored = os.fstat(self._file.fileno()).st_size

    def result(self) -> FileHash:
        """Return the hash of the complete file. Raises OSError if the file system holds another number of bytes."""
        if self._stored != self._size:
            raise OSError(f"{self._path} has {self._stored} bytes after {self._size} were written")
        if self._in_chunk or not self._hashes:
            self._end_chunk()
        return FileHash(self._size, self._hashes if len(self._hashes) > 1 else self._hashes[0])

    def _end_chunk(self) -> None:
        self._hashes.append(self._digest.hexdigest())
        self._digest, self._in_chunk = hashlib.sha256(), 0
