"""What is planned: a model and its data (`Workload`), and how a run lays them out over ranks (`Layout`).

Both are plain values: everything else in `scmdm.planner` is a pure function of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from scmdm.config.model import ModelConfig
from scmdm.config.run import RunConfig
from scmdm.diffusion.schedule import Schedule
from scmdm.models.linear import Linear
from scmdm.models.lora import freeze
from scmdm.models.model_files import ModelSpec
from scmdm.models.network import Network
from scmdm.training.optimizer import is_decayed


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    block: int | None  # None: in none, sharded with the rest
    group: tuple[bool, bool]  # of the optimizer: in the conditioner, decayed
    plain_linear: bool  # of an `nn.Linear` or `Linear` proper: those DeepSpeed's autocast sends in bfloat16
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Workload:
    """Model, data and objective: what does not depend on how it is run."""

    model: ModelConfig
    vocab_size: int
    length: int  # tokens of a sequence
    global_batch: int  # sequences of an optimizer step
    passes: int  # no-grad passes of a step; 0: vanilla
    averaged: bool  # has averaged weights (ema.decay > 0)
    schedule: Schedule
    trained_layers: int | None  # None: everything is trained
    parameters: tuple[Parameter, ...] = field(repr=False)

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """Those that have gradients, moments and averages."""
        return tuple(parameter for parameter in self.parameters if parameter.trained)

    def units(self) -> tuple[tuple[Parameter, ...], ...]:
        """The parameters that travel together under FSDP2: the rest, then each block."""
        rest = tuple(p for p in self.parameters if p.block is None)
        blocks: dict[int, list[Parameter]] = {}
        for parameter in self.parameters:
            if parameter.block is not None:
                blocks.setdefault(parameter.block, []).append(parameter)
        return (rest, *(tuple(blocks[block]) for block in sorted(blocks)))


@dataclass(frozen=True)
class Layout:
    """One way to run a workload; the names are those of the configuration."""

    engine: str  # single | fsdp2 | deepspeed
    ranks: int
    dtype: torch.dtype  # of compute: float32 | bfloat16
    micro_batch_size: int  # sequences at once on a rank
    activation_checkpointing: str = "none"
    replicate: int = 1
    context: int = 1
    reshard_after_estimate: bool = False
    offload: bool = False
    stage: int = 2
    param_persistence_threshold: int = 100_000
    gpu: bool = True  # a CPU keeps larger masks of dropout, and its head float32 logits

    @property
    def width(self) -> int:
        """Bytes of an element in compute."""
        return self.dtype.itemsize

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.ranks // self.replicate if self.engine == "fsdp2" else 1

    def micro_batches(self, workload: Workload) -> int:
        """Micro-batches of an optimizer step on each rank."""
        return workload.global_batch * self.context // (self.ranks * self.micro_batch_size)

    def tokens(self, workload: Workload) -> int:
        """Positions that a rank holds of a micro-batch."""
        return self.micro_batch_size * workload.length // self.context


def make_workload(config: RunConfig, spec: ModelSpec) -> Workload:
    """From a resolved configuration."""
    passes = config.self_conditioning.passes if config.self_conditioning.rate > 0 else 0
    model = spec.build()
    freeze(model, config)
    return Workload(
        model=spec.model,
        vocab_size=spec.vocab_size,
        length=spec.length,
        global_batch=config.train.global_batch_size,
        passes=passes,
        averaged=config.ema.decay > 0,
        schedule=spec.schedule,
        trained_layers=config.trained_layers,
        parameters=find_parameters(model),
    )


def find_parameters(model: Network) -> tuple[Parameter, ...]:
    """In the model's order; it may be on the meta device."""
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
            group=(name.startswith("conditioner."), is_decayed(name, parameter)),
            plain_linear=name in plain,
            trained=parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
    )


def make_layout(config: RunConfig, ranks: int, dtype: torch.dtype, *, gpu: bool = True) -> Layout:
    """As a configuration says; engine=auto is what it would be on so many ranks."""
    engine = config.engine if config.engine != "auto" else ("single" if ranks == 1 else "fsdp2")
    return Layout(
        engine=engine,
        ranks=ranks,
        dtype=dtype,
        micro_batch_size=config.train.micro_batch_size,
        activation_checkpointing=config.model.activation_checkpointing,
        replicate=config.fsdp.replicate,
        context=config.fsdp.context,
        reshard_after_estimate=config.fsdp.reshard_after_estimate,
        offload=config.fsdp.offload and engine == "fsdp2",
        stage=config.deepspeed.stage,
        param_persistence_threshold=config.deepspeed.param_persistence_threshold,
        gpu=gpu,
    )
