"""Decompression of shards, in bounded memory, checked against the index.

A compressed shard `NAME.mds.zstd` of a data set is decompressed once, beside it, to `NAME.mds`, where samples are read.
The compressed file may come from a stranger: its size, its frame's header and both hashes must be those of the index.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from scmdm.data.shard_index import SHARD_HASH, ShardInfo
from scmdm.errors import UserError
from scmdm.system.untrusted import describe, reading, require_regular

UNFINISHED = ".fetch."  # beginning of the names of temporary directories
_LARGEST_WINDOW = 2**27  # bytes; that of the highest level
_CHUNK = 2**20  # bytes
_HEADER = 18  # largest header of a frame
_REMEDY = "check the data set with `scmdm prepare --verify`, and restore the shard or prepare again"


def is_decompressed(path: Path | str, shard: ShardInfo) -> bool:
    """Return whether `path` is a file, not a link, of the size that the decompressed shard has."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == shard.raw_data.bytes


def decompress_file(path: Path, shard: ShardInfo, to: Path, name: str) -> None:
    """Decompress a shard's file, which errors call `name`; `to` is complete or as before.

    Raises UserError when the file is not as in the index, and when `to` cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=to.parent) as temporary:
            found = Path(temporary) / to.name
            with open(found, "wb") as file:
                for chunk in decompressed(path, shard, name):
                    file.write(chunk)
            os.replace(found, to)
    except OSError as error:
        raise UserError(
            f"cannot decompress {name} to {to}: {describe(error)}; free space, or give {to.parent.parent} as "
            "data.remote and a directory that can be written as data.path"
        ) from error


def decompressed(path: Path, shard: ShardInfo, name: str, remedy: str = _REMEDY) -> Iterator[bytes]:
    """Yield the content of a shard's compressed file, which errors call `name`.

    Raises UserError for another size, before anything is read, or for another header, before anything is decompressed;
    at the latest one chunk after the size in the index; and for other hashes at the end.
    """
    with reading(name, "compressed shard", remedy):
        assert shard.zip_data is not None
        if (size := require_regular(path).st_size) != shard.zip_data.bytes:
            raise ValueError(f"{size} bytes instead of {shard.zip_data.bytes}")
        with open(path, "rb", buffering=0) as file:
            yield from _checked_chunks(file, shard)


def _checked_chunks(file: IO[bytes], shard: ShardInfo) -> Iterator[bytes]:
    assert shard.zip_data is not None
    expected, digest, size = shard.raw_data.bytes, hashlib.sha1(), 0
    source: Any = _HashedFile(file)  # the decompressor calls nothing but `read`
    _require_size(file, expected)
    frame = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).stream_reader(source, read_size=_CHUNK)
    while chunk := frame.read(_CHUNK):
        size += len(chunk)
        if size > expected:
            raise ValueError(f"more than {expected} bytes when decompressed")
        digest.update(chunk)
        yield chunk
    if size != expected:
        raise ValueError(f"{size} bytes when decompressed instead of {expected}")
    while source.read(_CHUNK):
        pass
    if source.digest.hexdigest() != shard.zip_data.hashes[SHARD_HASH]:
        raise ValueError(f"it does not match its {SHARD_HASH} in the index")
    if digest.hexdigest() != shard.raw_data.hashes[SHARD_HASH]:
        raise ValueError(f"when decompressed, it does not match its {SHARD_HASH} in the index")


def _require_size(file: IO[bytes], expected: int) -> None:
    """Raise ValueError unless the header of the frame gives the expected size, and a window that is possible."""
    header = zstandard.get_frame_parameters(file.read(_HEADER))
    if header.content_size != expected:
        raise ValueError(f"its header gives {header.content_size} decompressed bytes instead of {expected}")
    if header.window_size > _LARGEST_WINDOW and header.window_size > expected:
        raise ValueError(f"its header gives a window of {header.window_size} bytes; at most {_LARGEST_WINDOW} are used")
    file.seek(0)


class _HashedFile:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha1()

    def read(self, size: int) -> Any:
        """Return at most `size` bytes."""
        data = self._file.read(size)
        self.digest.update(data)
        return data
