"""Saves and verifications on several ranks: `torchrun ... -m tests.checkpoint.on_ranks CASE DIRECTORY`.

Rank 0 writes what every rank has seen to `DIRECTORY/found.json`.
"""

import json
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from scmdm.checkpoint.model_verification import Verification, first_problem
from scmdm.checkpoint.reader import checkpoint_name, list_checkpoints, newest_checkpoint
from scmdm.checkpoint.writer import CheckpointWriter, Snapshot
from scmdm.config.training import TrainConfig
from scmdm.errors import UserError
from scmdm.models import tensor_files
from scmdm.system.hashing import COUNTS
from scmdm.system.process_group import barrier, current_world, process_group
from tests.distributed.gathering import all_gather_object

GROUPS = ("weights.", "ema.", "exp_avg.", "exp_avg_sq.")
ROWS, WIDTH, PARAMETERS = 1024, 2048, 4  # 32 MiB of each group
CHUNKS = Verification("share", together=True)


class Stop(BaseException):
    """Not an `Exception`, like KeyboardInterrupt and torch's CheckpointException."""


def sharded(step):
    """Tensors of a checkpoint, sharded over the ranks."""
    whole = {f"{group}p{i}": torch.full((ROWS, WIDTH), step + i) for group in GROUPS for i in range(PARAMETERS)}
    if current_world().size == 1:
        return {name: value.float() for name, value in whole.items()}
    mesh = init_device_mesh("cpu", (current_world().size,))
    return {name: distribute_tensor(value.float(), mesh, (Shard(0),)) for name, value in whole.items()}


def write_files(directory):
    for name in ("model.json", "state.json", "config.yaml"):
        (directory / name).write_text("{}")


def counted(call):
    """What a call returns, and the bytes that every rank has read and written for hashing."""
    before = (COUNTS.read, COUNTS.written)
    found = call()
    own = (COUNTS.read - before[0], COUNTS.written - before[1])
    return {"found": all_gather_object(found), "bytes": all_gather_object(own)}


def flip(path, position):
    barrier()
    if current_world().is_main:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)
    barrier()


def newest(directory):
    found, skipped = newest_checkpoint(directory, CHUNKS)
    return [found and found.name, *skipped]


def shares(directory):
    """Count the bytes of a save and of both kinds of opening, then damage what a base uses and what it does not."""
    writer = CheckpointWriter(directory, SimpleNamespace(rank=current_world().rank), TrainConfig(steps=9))
    tensors = sharded(1)
    writer.save(Snapshot(1, None, tensors, write_files), wait=True)

    def save():
        writer.save(Snapshot(2, None, tensors, write_files))
        for value in tensors.values():  # training goes on while the tensors are written
            (value.to_local() if isinstance(value, DTensor) else value).zero_()
        writer.finish()

    found = {"save": counted(save)}
    saved = directory / checkpoint_name(2)
    found["resume"] = counted(lambda: newest(directory))
    base = Verification("share", weights="ema", together=True)
    found["base"] = counted(lambda: first_problem(saved, base))
    found["sizes"] = counted(lambda: first_problem(saved, Verification("sizes", together=True)))
    found["full"] = counted(lambda: first_problem(saved, Verification("full", together=True)))
    last = sorted((saved / "tensors").iterdir())[-1]
    header = int.from_bytes(last.open("rb").read(8), "little") + 8
    share = (last.stat().st_size - header) // len(GROUPS)
    for name, position in (("ema", header + share // 2), ("moments", header + 2 * share + share // 2), ("header", 9)):
        flip(last, position)
        found[f"base with a flip in {name}"] = counted(lambda: first_problem(saved, base))
        found[f"resume with a flip in {name}"] = counted(lambda: newest(directory))
        flip(last, position)
    return found


def on_rank_1(action):
    """Call `action` on rank 1 in place of, or before, the writing of its tensors."""
    original = tensor_files.write_file

    def write(path, *arguments):
        action(path)
        return original(path, *arguments)

    if current_world().rank == 1:
        tensor_files.write_file = write


def raising(error):
    def action(*_):
        raise error

    return action


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def failures(directory):
    """Saves that fail in every way on rank 1, or on rank 0 after the tensors are written; then one that does not."""
    writer = CheckpointWriter(directory, SimpleNamespace(rank=current_world().rank), TrainConfig(steps=9))
    tensors, original, found = sharded(1), tensor_files.write_file, {}
    failures_of_1 = {
        "full disk": lambda _: limit_files(2**20),
        "removed directory": lambda path: shutil.rmtree(path.parents[1]),
        "no memory": raising(MemoryError("x")),
        "no exception": raising(Stop("x")),
    }
    for number, (name, action) in enumerate(failures_of_1.items(), start=1):
        on_rank_1(action)
        found[name] = all_gather_object(_save(writer, Snapshot(number, None, tensors, write_files)))
        tensor_files.write_file = original
        limit_files(resource.RLIM_INFINITY)
    found["rank 0"] = all_gather_object(_save(writer, Snapshot(8, None, tensors, raising(Stop("x")))))
    found["none"] = all_gather_object(_save(writer, Snapshot(9, None, tensors, write_files)))
    names = [path.name for path in list_checkpoints(directory)]
    return {**found, "names": names, "left": sorted(path.name for path in directory.glob(".*"))}


def _save(writer, captured):
    try:
        writer.save(captured)
        writer.finish()
    except UserError as error:
        return str(error)
    return None


def main():
    world = current_world()
    with process_group(world, torch.device("cpu"), needed=False):
        directory = Path(sys.argv[2])
        found = {"shares": shares, "failures": failures}[sys.argv[1]](directory)
        if world.is_main:
            (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
