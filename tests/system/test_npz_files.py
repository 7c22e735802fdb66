"""Files of arrays: what the header promises is compared with what the record holds before memory is taken."""

import io
import random
import zipfile

import numpy as np
import pytest

from scmdm.errors import UserError
from scmdm.system.npz_files import read_npz

ARRAYS = {"numbers": np.arange(12.0).reshape(3, 4), "names": np.array(["a", "bc"]), "count": np.array(3)}


def test_arrays_are_read_as_numpy_writes_them(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **ARRAYS)
    found = read_npz(tmp_path / "a.npz", "")
    assert found.keys() == ARRAYS.keys() and all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)


def record(descr, shape, data=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", record("<f8", (2**40,))),
        ("a.npy", record("<f8", (2**62, 2**62))),
        ("a.npy", record("<f8", (-1,), bytes(8))),
        ("a.npy", record("|O", (1,), b"cposix\nsystem\n")),
        ("a.npy", record("<c16", (1,), bytes(16))),
        ("a.npy", record("<f8", (1,), bytes(16))),
        ("a.npy", b"nonsense"),
        ("a.npy", b""),
        ("a.txt", record("<f8", (1,), bytes(8))),
    ],
)
def test_records_that_are_refused(tmp_path, name, content):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(name, content)
    with pytest.raises(UserError, match=r"x\.npz"):
        read_npz(tmp_path / "x.npz", "")


def test_no_flipped_bit_makes_another_exception(tmp_path):
    path, dice = tmp_path / "x.npz", random.Random(0)
    np.savez_compressed(path, **ARRAYS)
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_npz(path, "")
        except UserError:
            continue
        assert all(np.array_equal(found[name], ARRAYS[name]) for name in found if name in ARRAYS)
