"""`.npz` files: names, dtypes and sizes are checked before memory is allocated, and nothing is unpickled."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from scmdm.system.files import atomic_write_bytes
from scmdm.system.untrusted import reading, require_regular

_LARGEST = 2**32  # bytes of all arrays together
_KINDS = "biufU"  # kinds of dtypes: numbers and text


def read_npz(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Read all arrays of a file by name.

    Raises UserError for a damaged file, for arrays of objects, and for a header that describes more data than the
    record holds, or records of more than 4 GiB.
    """
    with reading(path, "file of arrays (.npz)", remedy):
        require_regular(path)
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if len({record.filename for record in records}) != len(records):
                raise ValueError("two arrays of the same name")
            if sum(record.file_size for record in records) > _LARGEST:
                raise ValueError(f"arrays of more than {_LARGEST} bytes")
            for record in records:
                _check_array(archive, record)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue())


def _check_array(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    with archive.open(record) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        held = record.file_size - file.tell()
    if not record.filename.endswith(".npy") or dtype.kind not in _KINDS:
        raise ValueError(f"{record.filename} is an array of {dtype}; expected numbers or text")
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{record.filename} of shape {shape} and {dtype} has {held} bytes")
