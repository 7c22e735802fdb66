"""Inputs of a plan: model and data (`Workload`), and their distribution over ranks (`ParallelLayout`).

Both are plain values; everything else in `scmdm.planner` is a pure function of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from scmdm.config.model import ModelConfig
from scmdm.config.run import RunConfig
from scmdm.diffusion.schedule import Schedule
from scmdm.models.conditioner import CONDITIONER_PREFIX
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.linear import Linear
from scmdm.models.lora import freeze
from scmdm.models.model_files import ROUTER, ModelSpec
from scmdm.models.network import Network
from scmdm.training.optimizer import is_decayed

_ROUTED = re.compile(r"\.experts\.(gate|up|down)\.")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the unsharded model."""

    name: str
    shape: tuple[int, ...]
    block: int | None  # None: outside of the blocks, sharded with the rest
    group: tuple[bool, bool]  # group of the optimizer: (in the conditioner, with weight decay)
    plain_linear: bool  # belongs to exactly `nn.Linear` or `Linear`, which DeepSpeed's autocast sends in bfloat16
    trained: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def routed(self) -> bool:
        """Whether this parameter is a stack of experts to which tokens are routed."""
        return _ROUTED.search(self.name) is not None

    @property
    def of_router(self) -> bool:
        """Whether this parameter belongs to a router."""
        return ROUTER in self.name


@dataclass(frozen=True)
class Workload:
    """Model, data and objective, independent of how they are run."""

    model: ModelConfig
    vocab_size: int
    length: int  # tokens per sequence
    global_batch: int  # sequences per optimizer step
    passes: int  # passes per step that compute the estimate; 0: vanilla training
    averaged: bool  # keeps averaged weights (ema.decay > 0)
    schedule: Schedule
    trained_layers: int | None  # blocks with trained weights; None: everything is trained
    parameters: tuple[Parameter, ...] = field(repr=False)
    block_length: int | None = None  # of a model of blocks
    shared_layers: int = 0  # first blocks that run once for all passes
    copies_base: bool = False  # keeps a frozen copy of the base, which makes the estimate

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def active_numel(self) -> int:
        """Number of active parameters: all except those of experts to which a token is not routed."""
        model = self.model
        if not isinstance(model, DecoderConfig) or not model.experts:
            return self.numel
        routed = sum(p.numel for p in self.parameters if p.routed)
        return self.numel - routed + routed * model.experts_per_token // model.experts

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """Parameters that have gradients, moments and averages."""
        return tuple(parameter for parameter in self.parameters if parameter.trained)

    @property
    def backward_from(self) -> int:
        """The first block that has a backward pass."""
        trained = [p.block for p in self.trained if p.block is not None]
        return min([*trained, *([self.model.inject_layer] if self.passes else []), self.model.layers])

    def units(self) -> tuple[tuple[Parameter, ...], ...]:
        """Parameters that FSDP2 gathers together: first those outside of the blocks, then each block's."""
        rest = tuple(p for p in self.parameters if p.block is None)
        blocks: dict[int, list[Parameter]] = {}
        for parameter in self.parameters:
            if parameter.block is not None:
                blocks.setdefault(parameter.block, []).append(parameter)
        return (rest, *(tuple(blocks[block]) for block in sorted(blocks)))


@dataclass(frozen=True)
class ParallelLayout:
    """One way to run a workload; fields have the names of the configuration's keys."""

    engine: str  # single | fsdp2 | deepspeed
    ranks: int
    dtype: torch.dtype  # dtype of compute: float32 or bfloat16
    micro_batch_size: int  # sequences that a rank processes at once
    activation_checkpointing: str = "none"
    replicate: int = 1
    context: int = 1
    experts: int = 1
    reshard_after_estimate: bool = False
    offload: bool = False
    stage: int = 2
    param_persistence_threshold: int = 100_000
    gpu: bool = True  # false: as on a CPU, whose dropout masks and logits are larger

    @property
    def width(self) -> int:
        """Bytes per element in the dtype of compute."""
        return self.dtype.itemsize

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the weights is sharded."""
        return self.ranks // self.replicate if self.engine == "fsdp2" else 1

    @property
    def holders(self) -> int:
        """Ranks over which one copy of an expert is sharded."""
        return self.shards // self.experts

    def micro_batches(self, workload: Workload) -> int:
        """Micro-batches of an optimizer step on each rank."""
        return workload.global_batch * self.context // (self.ranks * self.micro_batch_size)

    def tokens(self, workload: Workload) -> int:
        """Positions of a micro-batch on one rank."""
        return self.micro_batch_size * workload.length // self.context


def make_workload(config: RunConfig, spec: ModelSpec) -> Workload:
    """Make the workload of a resolved configuration."""
    model = spec.build()
    freeze(model, config)
    return Workload(
        model=spec.model,
        vocab_size=spec.vocab_size,
        length=spec.length,
        global_batch=config.train.global_batch_size,
        passes=config.estimate_passes,
        averaged=config.ema.decay > 0,
        schedule=spec.schedule,
        trained_layers=config.trained_layers,
        parameters=find_parameters(model),
        block_length=spec.diffusion.block_length,
        shared_layers=config.shared_layers,
        copies_base=config.copies_base,
    )


def find_parameters(model: Network) -> tuple[Parameter, ...]:
    """List the parameters of a model, which may be on the meta device."""
    plain = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if module.__class__ in (nn.Linear, Linear)
        for name, _ in module.named_parameters(recurse=False)
    }
    return tuple(
        Parameter(
            name=name,
            shape=tuple(parameter.shape),
            block=int(name.split(".")[1]) if name.startswith("blocks.") else None,
            group=(name.startswith(CONDITIONER_PREFIX), is_decayed(name, parameter)),
            plain_linear=name in plain,
            trained=parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
    )


def make_layout(config: RunConfig, ranks: int, dtype: torch.dtype, *, gpu: bool = True) -> ParallelLayout:
    """Make the layout of a configuration; `engine=auto` is resolved for the number of ranks."""
    engine = config.engine_on(ranks)
    return ParallelLayout(
        engine=engine,
        ranks=ranks,
        dtype=dtype,
        micro_batch_size=config.train.micro_batch_size,
        activation_checkpointing=config.model.activation_checkpointing,
        replicate=config.fsdp.replicate,
        context=config.fsdp.context,
        experts=config.fsdp.experts,
        reshard_after_estimate=config.fsdp.reshard_after_estimate,
        offload=config.fsdp.offload and engine == "fsdp2",
        stage=config.deepspeed.stage,
        param_persistence_threshold=config.deepspeed.param_persistence_threshold,
        gpu=gpu,
    )
