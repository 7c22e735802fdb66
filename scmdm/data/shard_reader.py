"""Fast reader of single samples of a shard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from scmdm.data.mosaic_streaming import MDSReader, StreamingFileInfo
from scmdm.data.shard_compression import is_decompressed
from scmdm.data.shard_index import ShardInfo, bytes_of_sample, dtype_and_length

_DAMAGED_TABLE = "the table of samples at the beginning of the file is damaged"


class ShardReader(MDSReader):
    """Reader of an MDS shard with columns of fixed sizes, as `scmdm.data.preparation.shard_writer` writes them.

    It parses the types of the columns once, and reads without a Python file object. In streaming's reader these two
    are most of the cost of a short sample. The samples are the end of the file, so that their places are known; the
    file's own table of places must agree, which finds most damage of it.
    """

    def __init__(self, root: Path, split: str, shard: ShardInfo) -> None:
        described = dict(vars(shard))
        del described["format"], described["version"]
        described["raw_data"] = StreamingFileInfo(**vars(shard.raw_data))
        described["zip_data"] = shard.zip_data and StreamingFileInfo(**vars(shard.zip_data))
        super().__init__(str(root), split, **described)
        self.info = shard
        self._path = os.path.join(self.dirname, self.split, self.raw_data.basename)
        self._columns = [(name, *dtype_and_length(encoding)) for name, encoding in shard.columns.items()]
        self._sample_bytes = bytes_of_sample(shard.columns)
        self._first = shard.raw_data.bytes - shard.samples * self._sample_bytes

    def set_up_local(self, listing: set[str], safe_keep_zip: bool) -> int:
        """Return the bytes of the shard that are local. Streaming would remove files of which it has no compressed one.

        A compressed file alone does not count: it is part of the data set, and its shard has yet to be decompressed.
        """
        if self.zip_data is None:
            return super().set_up_local(listing, safe_keep_zip)
        return self.raw_data.bytes if is_decompressed(self._path, self.info) else 0

    def _evict_zip(self) -> int:
        return 0  # part of the data set; a cache has none

    def get_sample_data(self, idx: int) -> bytes:
        """Return the bytes of a sample. The file begins with the number of samples and a table of their offsets."""
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offsets = os.pread(file, 8, 4 * (1 + idx))
            begin, end = int.from_bytes(offsets[:4], "little"), int.from_bytes(offsets[4:], "little")
            data = os.pread(file, self._sample_bytes, self._first + idx * self._sample_bytes)
        finally:
            os.close(file)
        if begin != self._first + idx * self._sample_bytes or end != begin + self._sample_bytes:
            raise ValueError(_DAMAGED_TABLE)
        if len(data) != self._sample_bytes:
            raise ValueError("the file ends before the sample")
        return data

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """Return the columns by name, as read-only arrays and scalars. Raises ValueError when bytes are missing."""
        sample: dict[str, Any] = {}
        at = 0
        for name, dtype, length in self._columns:
            values = np.frombuffer(data, dtype, length or 1, at)
            sample[name] = values if length else values[0]
            at += values.nbytes
        return sample

    def read_all(self, content: bytes | None = None) -> dict[str, np.ndarray]:
        """Return the columns of all samples by name, as arrays over the samples, from the file or its `content`."""
        row = np.dtype([(name, dtype, (length,) if length else ()) for name, dtype, length in self._columns])
        if content is None:
            table = np.fromfile(self._path, "<u4", self.samples + 1, offset=4)
            samples_N = np.fromfile(self._path, row, self.samples, offset=self._first)
        else:
            table = np.frombuffer(content, "<u4", self.samples + 1, 4)
            samples_N = np.frombuffer(content, row, self.samples, self._first)
        if len(samples_N) != self.samples:
            raise ValueError("the file ends before the last sample")
        if not np.array_equal(table, self._first + self._sample_bytes * np.arange(self.samples + 1)):
            raise ValueError(_DAMAGED_TABLE)
        return {name: samples_N[name] for name in self.column_names}
