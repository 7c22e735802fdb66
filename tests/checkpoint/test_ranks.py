"""On real ranks: what a save and an opening cost each of them, and failures that all of them learn of."""

import json

import pytest

from scmdm.checkpoint.reader import checkpoint_name
from scmdm.checkpoint.seal import SEAL, read_seal, verify_checkpoint
from scmdm.models.tensor_files import tensor_shapes
from scmdm.system.hashing import CHUNK_BYTES
from tests.checkpoint.on_ranks import GROUPS, PARAMETERS, ROWS, WIDTH
from tests.distributed.launching import launch

GROUP = 4 * ROWS * WIDTH * PARAMETERS  # bytes
SMALL = 2**18  # bytes, more than headers, descriptions and seals have


def found_by(processes, case, place):
    status, output = launch(processes, case, place, module="tests.checkpoint.on_ranks")
    assert status == 0, output
    return json.loads((place / "found.json").read_text())


@pytest.fixture(scope="module", params=[0, 2, 4])
def shares(request, tmp_path_factory):
    """Number of ranks, what they found, and where."""
    place = tmp_path_factory.mktemp("shares")
    return request.param or 1, found_by(request.param, "shares", place), place


@pytest.mark.slow
def test_bytes_per_rank_fall_with_the_number_of_ranks(shares):
    ranks, found, _ = shares
    whole = len(GROUPS) * GROUP
    for read, written in found["save"]["bytes"]:
        assert abs(written - whole / ranks) < SMALL and read < SMALL  # nothing is read again
    for name, size in (("resume", whole), ("base", GROUP)):
        counts = [read for read, _ in found[name]["bytes"]]
        assert size <= sum(counts) <= size + 2 * ranks * CHUNK_BYTES  # chunks at the borders of the averages
        assert max(counts) <= sum(counts) / ranks + CHUNK_BYTES
    assert found["resume"]["found"] == [["step_00000002"]] * ranks
    assert found["base"]["found"] == [None] * ranks
    assert all(read < SMALL for read, _ in found["sizes"]["bytes"])
    full = [read for read, _ in found["full"]["bytes"]]
    assert full[0] >= whole and all(read < SMALL for read in full[1:])


@pytest.mark.slow
def test_a_flipped_bit_is_found_by_all_ranks_if_it_is_used(shares):
    ranks, found, _ = shares
    file = f"shard-{ranks:05}-model-00001-of-00001.safetensors"
    for name in ("ema", "moments", "header"):
        problems = found[f"base with a flip in {name}"]["found"]
        assert len(problems) == ranks and len(set(problems)) == 1
        assert problems[0] is None if name == "moments" else file in problems[0]
        resumed = found[f"resume with a flip in {name}"]["found"]
        assert all(skipped == resumed[0] for skipped in resumed)
        assert resumed[0][0] == "step_00000001" and file in resumed[0][1]


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_in_any_way_has_failed_on_all(tmp_path):
    found = found_by(2, "failures", tmp_path)
    assert found.pop("names") == [checkpoint_name(9)] and found.pop("left") == []
    assert found.pop("none") == [None, None]
    assert len(found) == 5
    for number, (kind, problems) in enumerate(found.items(), start=1):
        name = checkpoint_name(8 if kind == "rank 0" else number)
        assert all(problem is not None and name in problem for problem in problems), kind
    checkpoint = tmp_path / checkpoint_name(9)
    assert verify_checkpoint(checkpoint) == []
    assert all(len(file.sha256) > 1 for name, file in read_seal(checkpoint).files.items() if "tensors/" in name)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensor_shapes(checkpoint / "tensors").items()}
    assert shapes == {f"{group}p{i}": (ROWS, WIDTH) for group in GROUPS for i in range(PARAMETERS)}


@pytest.mark.slow
@pytest.mark.parametrize("shares", [0], indirect=True)
def test_a_change_of_the_hashes_of_chunks_is_found(shares):
    seal = shares[2] / checkpoint_name(2) / SEAL
    text = seal.read_bytes()
    assert b'"chunk_bytes"' in text
    for position in range(0, 8 * len(text), 7):
        changed = bytearray(text)
        changed[position // 8] ^= 1 << position % 8
        seal.write_bytes(changed)
        assert verify_checkpoint(seal.parent, hashes=False)
    seal.write_bytes(text)
    assert verify_checkpoint(seal.parent) == []
