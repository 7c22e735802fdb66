"""Fast reader of single samples of a shard."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from scmdm.data.mosaic_streaming import MDSReader


class ShardReader(MDSReader):
    """Reader of an MDS shard with columns of fixed sizes, as `scmdm.data.preparation.shard_writer` writes them.

    It parses the types of the columns once, and reads without a Python file object. In streaming's reader these two
    are most of the cost of a short sample.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._path = os.path.join(self.dirname, self.split or "", self.raw_data.basename)
        types = zip(self.column_names, self.column_encodings, strict=True)
        self._columns = [(name, *_dtype_and_shape(encoding)) for name, encoding in types]

    def get_sample_data(self, idx: int) -> bytes:
        """Return the bytes of a sample. The file begins with the number of samples and a table of their offsets."""
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offsets = os.pread(file, 8, 4 * (1 + idx))
            begin, end = int.from_bytes(offsets[:4], "little"), int.from_bytes(offsets[4:], "little")
            data = os.pread(file, end - begin, begin)
        finally:
            os.close(file)
        if not data:
            raise IndexError(f"{self._path} ends before sample {idx}")
        return data

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """Return the columns by name, as read-only arrays and scalars. Raises ValueError when bytes are missing."""
        sample: dict[str, Any] = {}
        at = 0
        for name, dtype, shape in self._columns:
            values = np.frombuffer(data, dtype, shape or 1, at)
            sample[name] = values if shape else values[0]
            at += values.nbytes
        return sample


def _dtype_and_shape(encoding: str) -> tuple[np.dtype, int]:
    """Return data type and length of an encoding such as `ndarray:uint16:32`; length 0 for a scalar such as `int32`."""
    kind, *rest = encoding.split(":")
    if kind != "ndarray":
        return np.dtype(kind), 0
    dtype, length = rest
    return np.dtype(dtype), int(length)
