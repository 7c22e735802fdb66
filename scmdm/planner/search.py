"""Search for the fastest layout that fits into memory, with a reason if there is none."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scmdm.planner.duration import StepTime, step_time
from scmdm.planner.hardware import Assumptions, Cluster
from scmdm.planner.rank_memory import RankMemory, rank_memory
from scmdm.planner.workload import ParallelLayout, Workload

CHECKPOINTING = ("none", "selective", "full")
_EQUAL = 1.01  # among layouts within 1 % of the fastest, the simplest is taken
_LARGEST_FACTOR = 64  # maximum number of nodes to suggest, as a multiple of the given number


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory and duration."""

    layout: ParallelLayout
    memory: RankMemory
    time: StepTime
    fits: bool


@dataclass(frozen=True)
class SearchResult:
    """Result of a search: the best candidate, or the reason why there is none."""

    best: Candidate | None
    tried: int
    reason: str | None


def evaluate(workload: Workload, layout: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> Candidate:
    """Compute memory and duration of a layout that `impossible_because` accepts."""
    memory = rank_memory(workload, layout)
    fits = memory.peak.total <= usable_memory(cluster, assumed)
    return Candidate(layout, memory, step_time(workload, layout, cluster, assumed), fits)


def usable_memory(cluster: Cluster, assumed: Assumptions) -> float:
    """Bytes of GPU memory that a plan may use."""
    return cluster.gpu.memory * (1 - assumed.memory_reserve)


def impossible_because(workload: Workload, layout: ParallelLayout) -> str | None:
    """Return why a run with this layout would not start; None if it would."""
    if layout.engine == "single" and layout.ranks > 1:
        return f"engine=single cannot use {layout.ranks} GPUs"
    for key, value in (("fsdp.replicate", layout.replicate), ("fsdp.context", layout.context)):
        if layout.ranks % value:
            return f"{key}={value} does not divide {layout.ranks} GPUs"
    for what, number in (("the length", workload.length), ("model.heads", workload.model.heads)):
        if number % layout.context:
            return f"fsdp.context={layout.context} does not divide {what} = {number}"
    if workload.model.logit_shift and layout.context > 1:
        return f"fsdp.context={layout.context} is not possible with model.logit_shift=true"
    parts = layout.ranks // layout.context * layout.micro_batch_size
    if workload.global_batch % parts:
        return (
            f"train.global_batch_size={workload.global_batch} is not a multiple of {layout.ranks // layout.context} x "
            f"train.micro_batch_size={layout.micro_batch_size}"
        )
    return None


def search(workload: Workload, start: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> SearchResult:
    """Search over micro-batch size, activation checkpointing, sharding and context parallelism.

    Offloading is tried only if no other layout fits. Engine, precision and compilation stay as in `start`.
    """
    layouts = [layout for layout in _layouts(workload, start, cluster) if impossible_because(workload, layout) is None]
    candidates = [evaluate(workload, layout, cluster, assumed) for layout in layouts if not layout.offload]
    if not any(candidate.fits for candidate in candidates):
        candidates += [evaluate(workload, layout, cluster, assumed) for layout in layouts if layout.offload]
    fitting = [candidate for candidate in candidates if candidate.fits]
    if fitting:
        return SearchResult(_simplest(fitting), len(candidates), None)
    if not candidates:
        return SearchResult(None, 0, _why_none_is_possible(workload, start))
    return SearchResult(None, len(candidates), _why_none_fits(workload, candidates, start, cluster, assumed))


def _layouts(workload: Workload, start: ParallelLayout, cluster: Cluster) -> Iterator[ParallelLayout]:
    sizes = [2**power for power in range(workload.global_batch.bit_length())]
    kinds = [kind for kind in CHECKPOINTING if not (workload.model.compile and kind == "selective")]
    for size, kind, options in itertools.product(sizes, kinds, _options(workload, start, cluster)):
        yield dataclasses.replace(start, micro_batch_size=size, activation_checkpointing=kind, **options)


def _options(workload: Workload, start: ParallelLayout, cluster: Cluster) -> list[dict[str, Any]]:
    """Options of the engine to try, as fields of `ParallelLayout`."""
    if start.engine == "single":
        return [{}]
    if start.engine == "deepspeed":
        return [{"stage": stage} for stage in (1, 2, 3) if not (stage == 3 and workload.model.compile)]
    replicates = [n for n in _powers(start.ranks) if start.ranks // n == 1 or _whole_nodes(start.ranks // n, cluster)]
    contexts = _powers(min(cluster.gpus_per_node, start.ranks))
    reshards = (False, True) if workload.passes else (False,)
    return [
        {"replicate": replicate, "context": context, "reshard_after_estimate": reshard, "offload": offload}
        for replicate, context, reshard, offload in itertools.product(replicates, contexts, reshards, (False, True))
    ]


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length())]


def _whole_nodes(ranks: int, cluster: Cluster) -> bool:
    return ranks % cluster.gpus_per_node == 0 or cluster.gpus_per_node % ranks == 0


def _simplest(candidates: list[Candidate]) -> Candidate:
    fastest = min(candidate.time.seconds for candidate in candidates)
    return min((one for one in candidates if one.time.seconds <= fastest * _EQUAL), key=_complexity)


def _complexity(candidate: Candidate) -> tuple[int, ...]:
    layout = candidate.layout
    kind = CHECKPOINTING.index(layout.activation_checkpointing)
    order = (layout.context, layout.replicate, kind, layout.reshard_after_estimate, -layout.micro_batch_size)
    return (*map(int, order), candidate.memory.peak.total)


def _why_none_is_possible(workload: Workload, start: ParallelLayout) -> str:
    smallest = dataclasses.replace(start, micro_batch_size=1, replicate=1, context=1)
    reason = impossible_because(workload, smallest)
    return f"no layout is possible: {reason}; choose a global batch that {start.ranks} ranks can share, or fewer GPUs"


def _why_none_fits(
    workload: Workload, candidates: list[Candidate], start: ParallelLayout, cluster: Cluster, assumed: Assumptions
) -> str:
    least = min(candidates, key=lambda candidate: candidate.memory.peak.total)
    peak, usable = least.memory.peak, usable_memory(cluster, assumed)
    largest = max(dataclasses.fields(peak), key=lambda field: getattr(peak, field.name)).name
    gib = 2**30
    return (
        f"none of {len(candidates)} layouts fits: the smallest needs {peak.total / gib:.1f} GiB of "
        f"{usable / gib:.1f} GiB, most of it {largest} ({getattr(peak, largest) / gib:.1f} GiB) at the "
        f"{least.memory.peak_at}; {_remedy(workload, start, cluster, assumed)}"
    )


def _remedy(workload: Workload, start: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> str:
    factor = 2
    while start.engine != "single" and factor <= _LARGEST_FACTOR:
        larger = dataclasses.replace(cluster, nodes=cluster.nodes * factor)
        layouts = _layouts(workload, dataclasses.replace(start, ranks=larger.ranks), larger)
        possible = (one for one in layouts if impossible_because(workload, one) is None)
        if any(rank_memory(workload, one).peak.total <= usable_memory(larger, assumed) for one in possible):
            return f"it would fit on {larger.nodes} nodes"
        factor *= 2
    return "shorten the sequences, use a GPU with more memory, or shard with engine=fsdp2 on more of them"
