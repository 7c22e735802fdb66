"""What a rank holds between steps, to the byte: weights, gradients, moments and averages of its own shards.

The figures are those of rank 0. Where a parameter's rows do not divide evenly, the first ranks hold one row more: no
rank holds more than rank 0. Under FSDP2 every shard is padded to the first one's size, so that all hold about the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.planner.workload import Layout, Parameter, Workload

FLOAT32 = 4  # bytes: weights, gradients, moments and averages are float32 in every engine and precision
_COUNTER = 4  # AdamW counts its updates in one float32 per tensor
_ZERO_ALIGNMENT = 2  # DeepSpeed stages 1 and 2 pad a group to this times the ranks (`nccl_start_alignment_factor`)


@dataclass(frozen=True)
class State:
    """Bytes that stay from step to step; gradients while they are whole, at the update."""

    weights: int
    gradients: int
    moments: int
    averages: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.averages


def rank_state(workload: Workload, layout: Layout) -> State:
    """Of rank 0."""
    if layout.engine == "deepspeed":
        return _zero_state(workload, layout)
    held, trained = (
        sum(held_elements(parameter, layout.shards) for parameter in parameters) * FLOAT32
        for parameters in (workload.parameters, workload.trained)
    )
    moments = 2 * trained + _COUNTER * len(workload.trained)
    return State(held, trained, moments, trained if workload.averaged else 0)


def held_elements(parameter: Parameter, shards: int) -> int:
    """Elements of a parameter on rank 0 when its rows are dealt out as evenly as `torch.chunk` deals them."""
    rows = parameter.shape[0]
    return -(-rows // shards) * (parameter.numel // rows)


def _zero_state(workload: Workload, layout: Layout) -> State:
    if layout.stage == 3:
        return _zero_3_state(workload, layout)
    groups: dict[tuple[bool, bool], int] = {}
    for parameter in workload.parameters:
        groups[parameter.group] = groups.get(parameter.group, 0) + parameter.numel
    step = _ZERO_ALIGNMENT * layout.ranks
    padded = {group: -(-numel // step) * step for group, numel in groups.items()}
    parts = {group: numel // layout.ranks for group, numel in padded.items()}
    whole, part = sum(padded.values()) * FLOAT32, sum(parts.values()) * FLOAT32
    averages = sum(min(parts[group], numel) for group, numel in groups.items()) * FLOAT32
    # The rank's part of the weights is there twice: in the model, and as what the optimizer updates.
    return State(whole + part, part, 2 * part + _COUNTER * len(groups), averages if workload.averaged else 0)


def _zero_3_state(workload: Workload, layout: Layout) -> State:
    part = sum(-(-parameter.numel // layout.ranks) for parameter in workload.parameters) * FLOAT32
    groups = len({parameter.group for parameter in workload.parameters})
    return State(part, part, 2 * part + _COUNTER * groups, part if workload.averaged else 0)
