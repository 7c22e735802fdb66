"""What opening a model and packing a checkpoint cost each rank with ZeRO; started by torchrun, rank 0 prints JSON."""

import json

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from scmdm.checkpoint.train_state import trained_groups
from scmdm.distributed.ema import Ema
from scmdm.planner.activation_memory import LiveBytes
from scmdm.torch_private import TorchDispatchMode
from tests.planner.measuring import engine_of, run_config

STAGES = (3, 1)
VOCAB, LENGTH = 1001, 16
BUCKET = 500_000_000 * 4  # bytes of stage 3's buffer for gradients, whatever the model and the number of ranks


class Exchanged(TorchDispatchMode):
    """Counts the bytes that leave this rank in all-to-alls; no other collective may run."""

    def __init__(self):
        super().__init__()
        self.bytes = self.times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d."):
            assert str(function).startswith("c10d.alltoall_base"), function
            self.times += 1
            self.bytes += args[1].nbytes
        return function(*args, **(kwargs or {}))


def costs(stage):
    ranks = dist.get_world_size()
    keys = {"width": 128, "layers": 4, "heads": 4, "condition_width": 8}
    zero = {"stage": stage, "param_persistence_threshold": 0}
    config = run_config("deepspeed", batch=ranks, deepspeed=zero, **keys)
    with LiveBytes() as opening:
        engine = engine_of(config, VOCAB, LENGTH)
    ema = Ema(engine, config.ema)
    groups = trained_groups(engine, ema)
    for group in groups.values():
        for name, value in group.items():
            value.copy_(indices(engine, name))
    with LiveBytes(value for group in groups.values() for value in group.values()) as packing, Exchanged() as saved:
        packed = {prefix: engine.pack(group) for prefix, group in groups.items()}
    for group in packed.values():
        assert all(rows_are_right(value) for value in group.values())
        for value in group.values():
            value.to_local().neg_()  # as a checkpoint that is read in place, with other values
    with Exchanged() as loaded:
        for prefix, group in groups.items():
            engine.unpack(packed[prefix], group)
    for group in groups.values():
        assert all(torch.equal(value, -indices(engine, name)) for name, value in group.items())
    return {
        "stage": stage,
        "parameters": sum(fragment.bounds[-1] for fragment in engine._fragments.values()) * 4,
        "opening": opening.peak - (BUCKET if stage == 3 else 0),
        "packing": packing.peak,
        "saved": saved.bytes,
        "loaded": loaded.bytes,
        "times": saved.times,
    }


def indices(engine, name):
    """The index of each element of this rank's fragment."""
    bounds = engine._fragments[name].bounds
    return torch.arange(bounds[engine.rank], bounds[engine.rank + 1], dtype=torch.float32)


def rows_are_right(value):
    """Whether rows hold the indices of their elements."""
    assert isinstance(value, DTensor)
    whole = torch.arange(value.numel(), dtype=torch.float32).view(value.shape)
    parts = whole.chunk(dist.get_world_size())
    mine = parts[dist.get_rank()] if dist.get_rank() < len(parts) else whole[:0]
    return torch.equal(value.to_local(), mine)


def main():
    dist.init_process_group("gloo")
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [costs(stage) for stage in STAGES])
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(everyone))
    dist.barrier()  # a rank that leaves early would close the connection of the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
