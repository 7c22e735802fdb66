"""Bytes of weights, gradients, moments and averages on a rank, and of what engines gather and reduce.

All figures are for rank 0. No rank holds more: where the rows of a parameter do not divide evenly, `torch.chunk` gives
the first ranks the rounded-up number (10 rows: 3, 3, 3, 1). FSDP2 pads every shard to the size of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scmdm.models.lora import EXPERT_BIAS
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
        sum(held_elements(parameter, layout) for parameter in parameters) * FLOAT32
        for parameters in (workload.parameters, workload.trained)
    )
    moments = 2 * trained + _COUNTER * len(workload.trained)
    copied = held if workload.copies_base else 0  # includes the conditioner, which is small, though the base has none
    return TrainingState(held, trained, moments, trained if workload.averaged else 0, copied)


def held_elements(parameter: Parameter, layout: ParallelLayout) -> int:
    """Elements of a parameter on rank 0 if its rows are distributed as by `torch.chunk`.

    Those of experts are divided over the ranks that share them first, then each rank's over the holders of its experts.
    """
    if layout.engine == "fsdp2" and parameter.name.endswith(EXPERT_BIAS):  # whole on each rank
        return parameter.numel
    rows, shards, row = parameter.shape[0], layout.shards, parameter.numel // parameter.shape[0]
    if parameter.routed:
        rows, shards = rows // layout.experts, layout.holders
    return -(-rows // shards) * row


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


@dataclass(frozen=True)
class GatheredGroup:
    """Parameters that FSDP2 gathers and reduces together."""

    what: str  # rest | blocks | routers | experts
    ranks: int
    weights: int  # bytes that are gathered
    gradients: int  # bytes in float32 that are reduced


def block_groups(workload: Workload, layout: ParallelLayout) -> list[list[GatheredGroup]]:
    """Return the groups of each block: its own, and those within it."""
    return [_groups_of(unit, layout) for unit in workload.units()[1:]]


def _groups_of(unit: tuple[Parameter, ...], layout: ParallelLayout) -> list[GatheredGroup]:
    own: dict[tuple[str, str], list[Parameter]] = {}
    for parameter in unit:
        own.setdefault(_group_of(parameter, layout), []).append(parameter)
    widths = {"routers": FLOAT32}
    return [_group(what, part, layout, widths.get(what, layout.width)) for (what, _), part in own.items() if what]


def _group_of(parameter: Parameter, layout: ParallelLayout) -> tuple[str, str]:
    """Return the kind of a block's parameter and its group of this kind; an empty kind is not gathered."""
    if parameter.name.endswith(EXPERT_BIAS):
        return "", ""
    if parameter.of_router:
        return "routers", ""
    if parameter.routed and layout.experts > 1:  # a map of all experts, with its adapters
        return "experts", parameter.name.partition(".experts.")[2].partition(".")[0]
    return "blocks", ""


def _group(what: str, parameters: Sequence[Parameter], layout: ParallelLayout, width: int) -> GatheredGroup:
    """Sum up parameters that are gathered together; every shard is as large as rank 0's."""
    ranks = layout.holders if what == "experts" else layout.shards
    whole, trained = (
        ranks * sum(held_elements(p, layout) for p in found)
        for found in (parameters, [p for p in parameters if p.trained])
    )
    return GatheredGroup(what, ranks, whole * width, trained * FLOAT32)


def gathered_weights(workload: Workload, layout: ParallelLayout) -> GatheredWeights:
    """Return what the engine gathers and reduces on one rank."""
    if layout.engine != "fsdp2":
        return _zero_gathered(workload, layout)
    rest_width = head_width(workload, layout)
    rest, blocks = _group("rest", workload.units()[0], layout, rest_width), block_groups(workload, layout)
    sizes = [sum(group.weights for group in groups) for groups in blocks]
    return GatheredWeights(
        rest=rest.weights,
        block=max(sizes),  # blocks with experts are larger than those without
        blocks=sum(sizes),
        # Prefetch of the next group in either direction.
        buffers=max(group.weights for groups in blocks for group in groups),
        # With train.last_layers only the last blocks have gradients.
        block_reduction=max(group.gradients for group in blocks[-1]),
        rest_gradients=rest.gradients // FLOAT32 * rest_width,
        rest_reduction=rest.gradients,
        rest_width=rest_width,
    )


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
