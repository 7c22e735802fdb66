"""Bytes of weights, gradients, moments and averages on a rank, and of what engines gather and reduce.

All figures are for rank 0. Where the rows of a parameter do not divide evenly, the first ranks hold one row more,
so no rank holds more than rank 0. FSDP2 pads every shard to the size of the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scmdm.planner.workload import ParallelLayout, Parameter, Workload

FLOAT32 = 4  # bytes; weights, gradients, moments and averages are float32 in every engine and precision
ZERO_LIVE = 1_000_000_000  # elements that DeepSpeed stage 3 keeps gathered in vanilla steps (`max_live_parameters`)
_COUNTER = 4  # bytes of AdamW's step counter, one float32 per tensor
_ZERO_ALIGNMENT = 2  # DeepSpeed stages 1 and 2 pad a group to this times the ranks (`nccl_start_alignment_factor`)
_ZERO_BUCKET = 500_000_000  # elements of DeepSpeed's buffer for gradients (`reduce_bucket_size`, its default)


@dataclass(frozen=True)
class TrainingState:
    """Bytes of the state that persists between steps, and of the gradients at the update."""

    weights: int
    gradients: int
    moments: int
    averages: int
    base: int = 0  # weights of a frozen copy of the base, which no checkpoint contains

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.moments + self.averages + self.base


def rank_state(workload: Workload, layout: ParallelLayout) -> TrainingState:
    """Return the exact training state of rank 0."""
    if layout.engine == "deepspeed":
        return _zero_3_state(workload, layout) if layout.stage == 3 else _zero_state(workload, layout)
    held, trained = (
        sum(held_elements(parameter, layout.shards) for parameter in parameters) * FLOAT32
        for parameters in (workload.parameters, workload.trained)
    )
    moments = 2 * trained + _COUNTER * len(workload.trained)
    copied = held if workload.copies_base else 0  # the conditioner, which is small, is none of the base's
    return TrainingState(held, trained, moments, trained if workload.averaged else 0, copied)


def held_elements(parameter: Parameter, shards: int) -> int:
    """Elements of a parameter on rank 0 if its rows are distributed as by `torch.chunk`."""
    rows = parameter.shape[0]
    return -(-rows // shards) * (parameter.numel // rows)


def _zero_state(workload: Workload, layout: ParallelLayout) -> TrainingState:
    groups: dict[tuple[bool, bool], int] = {}
    for parameter in workload.parameters:
        groups[parameter.group] = groups.get(parameter.group, 0) + parameter.numel
    step = _ZERO_ALIGNMENT * layout.ranks
    padded = {group: -(-numel // step) * step for group, numel in groups.items()}
    parts = {group: numel // layout.ranks for group, numel in padded.items()}
    whole, part = sum(padded.values()) * FLOAT32, sum(parts.values()) * FLOAT32
    averages = sum(min(parts[group], numel) for group, numel in groups.items()) * FLOAT32
    # The rank's part of the weights exists twice: in the model, and as the optimizer's copy.
    return TrainingState(whole + part, part, 2 * part + _COUNTER * len(groups), averages if workload.averaged else 0)


def _zero_3_state(workload: Workload, layout: ParallelLayout) -> TrainingState:
    part = sum(-(-parameter.numel // layout.ranks) for parameter in workload.parameters) * FLOAT32
    groups = len({parameter.group for parameter in workload.parameters})
    return TrainingState(part, part, 2 * part + _COUNTER * groups, part if workload.averaged else 0)


@dataclass(frozen=True)
class GatheredWeights:
    """Bytes of whole weights and gradients in addition to a rank's shards; 0 where weights are not sharded."""

    rest: int  # embedding, head, time embedding, conditioner
    block: int
    blocks: int  # all blocks
    buffers: int  # outputs of collectives, from which weights are copied
    block_reduction: int  # input of a block's reduce-scatter
    rest_gradients: int
    rest_reduction: int
    rest_width: int  # bytes per element of the rest
    buckets: int = 0  # DeepSpeed's buffers for gradients


def head_width(workload: Workload, layout: ParallelLayout) -> int:
    """Bytes of an element in the output head."""
    return FLOAT32 if workload.model.head_precision == "float32" else layout.width


def gathered_weights(workload: Workload, layout: ParallelLayout) -> GatheredWeights:
    """Return what the engine gathers and reduces on one rank."""
    if layout.engine != "fsdp2":
        return _zero_gathered(workload, layout)
    width = layout.width
    rest_width = head_width(workload, layout)
    units = workload.units()
    rest, *own = (_padded(unit, layout.shards) for unit in units)
    block = max(own)  # blocks with experts are larger than those without
    # With train.last_layers only the last blocks have gradients.
    rest_trained, block_trained = (
        _padded(tuple(p for p in unit if p.trained), layout.shards) for unit in (units[0], units[-1])
    )
    return GatheredWeights(
        rest=rest * rest_width,
        block=block * width,
        blocks=sum(own) * width,
        buffers=block * width,  # prefetch of the next block in either direction
        block_reduction=block_trained * FLOAT32,
        rest_gradients=rest_trained * rest_width,
        rest_reduction=rest_trained * FLOAT32,
        rest_width=rest_width,
    )


def _padded(unit: tuple[Parameter, ...], shards: int) -> int:
    """Elements of parameters if every shard is as large as rank 0's."""
    return sum(held_elements(parameter, shards) * shards for parameter in unit)


def _zero_gathered(workload: Workload, layout: ParallelLayout) -> GatheredWeights:
    """Gathered weights of a single process or DeepSpeed; stage 3 gathers a module at a time, and embeddings."""
    zero_3 = layout.engine == "deepspeed" and layout.stage == 3
    module = max(p.numel for p in workload.units()[1]) * layout.width if zero_3 else 0
    outside = sum(p.numel for p in workload.units()[0]) * FLOAT32 if zero_3 else 0
    if zero_3 and not workload.passes:
        outside = max(outside, min(workload.numel, ZERO_LIVE) * layout.width)
    return GatheredWeights(
        rest=outside,
        block=module,
        blocks=module,
        buffers=module,
        block_reduction=0,
        rest_gradients=module,
        rest_reduction=0,
        rest_width=FLOAT32,
        buckets=_zero_buckets(workload, layout) if layout.engine == "deepspeed" else 0,
    )


def _zero_buckets(workload: Workload, layout: ParallelLayout) -> int:
    """DeepSpeed's buffers for gradients, one per communication dtype; stages 1 and 2 allocate all in float32."""
    widths = {layout.width if p.plain_linear else FLOAT32 for p in workload.parameters}
    return sum(width if layout.stage == 3 else FLOAT32 for width in widths) * _ZERO_BUCKET


def gathers_in_compute_dtype(layout: ParallelLayout) -> bool:
    """Return whether a block receives weights in the dtype of compute, not in float32 that autocast copies."""
    return layout.dtype != torch.float32 and (
        layout.engine == "fsdp2" or (layout.engine == "deepspeed" and layout.stage == 3)
    )
