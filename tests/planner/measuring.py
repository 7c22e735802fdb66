"""Measurements of real passes, for comparison with plans."""

import collections
import typing

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scmdm.config.model import DENOISERS
from scmdm.config.run import RunConfig
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import NoisedBatch
from scmdm.models.model_files import ModelSpec
from scmdm.training.setup import build_engine

CPU = torch.device("cpu")


def run_config(engine="single", *, rate=1.0, micro=1, batch=None, fsdp=None, deepspeed=None, **model):
    config = RunConfig(run_dir="unused", engine=engine)
    given = {"kind": "dit", "width": 64, "layers": 3, "heads": 4, "attention": "sdpa", **model}
    if given["kind"] == "dit":
        given.setdefault("condition_width", 8)
    config.model = DENOISERS.schema(given["kind"])(self_conditioned=rate > 0, **given)
    config.self_conditioning.rate = rate
    config.train.micro_batch_size, config.train.global_batch_size = micro, batch or micro
    for section, values in ((config.fsdp, fsdp), (config.deepspeed, deepspeed)):
        for key, value in (values or {}).items():
            setattr(section, key, value)
    return config


def spec_of(config, vocab, length):
    return ModelSpec(config.model, config.diffusion, vocab, vocab - 1, length)


def engine_of(config, vocab, length, dtype=torch.float32):
    return build_engine(config, spec_of(config, vocab, length), None, CPU, dtype)


def masked_batch(rows, length, vocab, *, blocks=False):
    """A batch of which every position is masked: the most that a pass can need; with `blocks`, of a model of blocks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, vocab - 1, (rows, length), generator=generator)
    z, t = torch.full_like(x, vocab - 1), torch.ones(rows).double()
    block_t = t[:, None].expand(x.shape) if blocks else None
    return NoisedBatch(x, z, t, torch.ones_like(x).bool(), torch.ones(rows).bool(), block_t=block_t)


def loss_of(engine, config, batch):
    with engine.compute():
        return self_conditioned_nelbo(
            engine.denoiser,
            batch,
            engine.model.schedule,
            condition=config.self_conditioning.rate > 0,
            passes=config.self_conditioning.passes,
            share_lower=config.shared_layers > 0,
        ).loss


class Collectives(TorchDispatchMode):
    """Counts torch.distributed's collectives by kind and the bytes of their whole tensor."""

    KINDS: typing.ClassVar = {
        "allgather": "all_gather",
        "reduce_scatter": "reduce_scatter",
        "allreduce": "all_reduce",
        "alltoall": "all_to_all",
    }

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d."):
            kind = next((kind for name, kind in self.KINDS.items() if name in str(function)), None)
            tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
            if kind == "all_to_all":  # what is sent
                self.seen[kind, tensors[1].nbytes] += 1
            elif kind and max(tensor.numel() for tensor in tensors) > 1:  # not single numbers, such as a norm
                self.seen[kind, max(tensor.nbytes for tensor in tensors)] += 1
        return function(*args, **(kwargs or {}))

    def bytes(self, kind):
        return sum(size * times for (seen, size), times in self.seen.items() if seen == kind)


def storage_bytes(tensors):
    """Of the storages of this rank's parts of tensors, each once."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in local]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
