"""Sharded and replicated tensors: every element is written by exactly one rank."""

import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.counting import fake_ranks
from scmdm.models import tensor_files
from scmdm.models.tensor_files import iterate_tensors, tensor_shapes
from scmdm.system.process_group import World
from tests.distributed.launching import launch
from tests.models.reading_ranks import PLAIN, SHAPES

WHOLE = {f"{rows}x{columns}": torch.randn(rows, columns) for rows, columns in ((8, 3), (7, 2), (1, 4), (2, 5), (0, 3))}
MESHES = {
    "sharded": ((4,), (Shard(0),)),
    "replicated shards": ((2, 2), (Replicate(), Shard(0))),
    "shards of replicas": ((2, 2), (Shard(0), Replicate())),
    "replicas": ((4,), (Replicate(),)),
}


def part_of(whole, mesh, placements):
    """This rank's part as torch divides it."""
    part = whole
    for dimension, place in enumerate(placements):
        if place.is_shard():
            chunks, at = part.chunk(mesh.size(dimension)), mesh.get_local_rank(dimension)
            part = chunks[at] if at < len(chunks) else part[:0]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


@pytest.mark.parametrize("kind", MESHES)
def test_every_element_is_written_once(kind, tmp_path):
    shape, placements = MESHES[kind]
    total = 0
    for world in (World(rank, 4, rank) for rank in range(4)):
        with fake_ranks(world.size, world.rank):
            mesh = init_device_mesh("cpu", shape)
            tensors = {name: part_of(whole, mesh, placements) for name, whole in WHOLE.items()}
            plain = {f"plain {name}": whole for name, whole in WHOLE.items()}
            written = tensor_files._write_part(tmp_path, tensors | plain, None, world.rank, world.size)
            total += written.tensor_bytes
            assert sum(tensor.nbytes for tensor in tensors.values()) == sum(whole.nbytes for whole in WHOLE.values())
    assert total == 2 * sum(whole.nbytes for whole in WHOLE.values())
    expected = WHOLE | {f"plain {name}": whole for name, whole in WHOLE.items()}
    assert {name: tensor.shape for name, tensor in tensor_shapes(tmp_path).items()} == {
        name: whole.shape for name, whole in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in iterate_tensors(tmp_path, list(expected)))


@pytest.mark.slow
def test_ranks_share_the_headers_and_open_the_files_that_they_need(tmp_path):
    """Four ranks have written a file each."""
    status, output = launch(4, tmp_path, module="tests.models.reading_ranks")
    assert status == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    assert {tuple(sorted(shapes)) for shapes, _ in found["shapes"]} == {tuple(sorted([*SHAPES, PLAIN]))}
    assert [opened for _, opened in found["shapes"]] == [1] * 4
    for name in ("same", "columns", "replicated"):
        assert [right for right, _ in found[name]] == [True] * 4, name
    # A header, its own file, and the one that has the tensor which is not sharded.
    assert all(opened <= 3 for _, opened in found["same"])
    assert all(opened <= 5 for _, opened in found["columns"])
    for name in ("missing", "other shape"):
        assert all(isinstance(problem, str) and str(tmp_path) in problem for problem, _ in found[name]), name
    for name in ("damaged", "damaged shapes"):
        problems = {problem for problem, _ in found[name]}
        assert len(problems) == 1 and "shard-00004-model-00001-of-00001.safetensors" in problems.pop(), name
