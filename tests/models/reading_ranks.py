"""Ranks that write tensors and read them again: `torchrun ... -m tests.models.reading_ranks DIRECTORY`.

Rank 0 writes what every rank has seen to `DIRECTORY/found.json`.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks.counting import OpenedTensorFiles
from scmdm.errors import UserError
from scmdm.models.tensor_files import read_tensors, tensor_shapes, write_tensors
from scmdm.system.process_group import barrier, current_world, process_group
from tests.distributed.gathering import all_gather_object

SHAPES = {"even": (12, 4), "uneven": (7, 3), "few": (2, 5), "empty": (0, 3), "deep": (6, 4, 2)}
PLAIN = "plain"


def expected(name, shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + len(name)


def blank(mesh, placements):
    tensors = {n: distribute_tensor(torch.full(shape, -1.0), mesh, placements) for n, shape in SHAPES.items()}
    return {**tensors, PLAIN: torch.full((3, 2), -1.0)}


def is_right(tensors):
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    return all(torch.equal(value, expected(name, value.shape)) for name, value in whole.items())


def observed(call):
    """What every rank's call returned or raised, and how many files of tensors it opened."""
    before = OPENED.count
    try:
        result = call()
    except UserError as error:
        result = str(error)
    return all_gather_object([result, OPENED.count - before])


def read(directory, mesh, placements):
    tensors = blank(mesh, placements)
    read_tensors(directory, tensors)
    return is_right(tensors)


def main():
    directory, world = Path(sys.argv[1]), current_world()
    with process_group(world, torch.device("cpu"), needed=False):
        line, square = init_device_mesh("cpu", (world.size,)), init_device_mesh("cpu", (2, world.size // 2))
        written = {n: distribute_tensor(expected(n, shape), line, (Shard(0),)) for n, shape in SHAPES.items()}
        place = directory / "tensors"
        place.mkdir(exist_ok=True)
        write_tensors(place, {**written, PLAIN: expected(PLAIN, (3, 2))})
        barrier()
        found = {
            "shapes": observed(lambda: {n: list(t.shape) for n, t in tensor_shapes(place, alone=False).items()}),
            "same": observed(lambda: read(place, line, (Shard(0),))),
            "columns": observed(lambda: read(place, line, (Shard(1),))),
            "replicated": observed(lambda: read(place, square, (Replicate(), Shard(0)))),
            "alone": observed(lambda: read_tensors(place, {PLAIN: torch.zeros(3, 2)}, alone=True)),
            "missing": observed(lambda: read_tensors(place, {"other": torch.zeros(1)})),
            "other shape": observed(lambda: read_tensors(place, {PLAIN: torch.zeros(3, 3)})),
        }
        if world.is_main:
            damaged = sorted(place.iterdir())[-1]
            damaged.write_bytes(damaged.read_bytes()[:-1])
        barrier()
        found["damaged"] = observed(lambda: read(place, line, (Shard(0),)))
        found["damaged shapes"] = observed(lambda: len(tensor_shapes(place, alone=False)))
        if world.is_main:
            (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    OPENED = OpenedTensorFiles()
    main()
