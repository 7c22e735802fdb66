"""Files that are written tensor by tensor are those that the library reads, and their hashes those of the bytes."""

import hashlib

import pytest
import safetensors.torch
import torch

from scmdm.models.safetensors_headers import read_header
from scmdm.models.safetensors_writer import write_file
from scmdm.models.tensor_files import iterate_tensors
from scmdm.system.hashing import CHUNK_BYTES, HashingFile, chunk_ends, hash_file

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
TENSORS = {
    **{f"odd {dtype}": torch.arange(7).to(dtype) for dtype in DTYPES},
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "part": torch.arange(100.0)[10:20],
}


def test_the_library_reads_what_was_written(tmp_path):
    path = tmp_path / "a.safetensors"
    found = write_file(path, TENSORS, {"format": "pt"})
    read = safetensors.torch.load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and found.bytes == path.stat().st_size
    header = read_header(path)
    assert header.metadata == {"format": "pt"} and header.bytes % 8 == 0
    assert all(tensor.begin % tensor.dtype.itemsize == 0 for tensor in header.tensors.values())
    ours = dict(iterate_tensors(tmp_path, sorted(TENSORS)))
    assert list(ours) == sorted(TENSORS) and all(torch.equal(ours[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("step", [1, 17, 64, 300])
def test_hashes_of_chunks_do_not_depend_on_the_sizes_of_writes(tmp_path, size, step):
    data = bytes(range(256))[:size]
    with HashingFile(tmp_path / "f", 64) as file:
        for begin in range(0, size, step):
            file.write(data[begin : begin + step])
    expected = [hashlib.sha256(data[begin:end]).hexdigest() for begin, end in chunk_ends(size, 64)]
    assert file.result() == hash_file(tmp_path / "f", 64)
    assert file.result().sha256 == (expected if len(expected) > 1 else expected[0])
    assert (tmp_path / "f").read_bytes() == data


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(FileExistsError), HashingFile(tmp_path / "f", CHUNK_BYTES):
        pass
    assert (tmp_path / "f").read_text() == "x"
