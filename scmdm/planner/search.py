"""Search for the fastest layout that fits into memory, with a reason if there is none."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scmdm.models.experts.expert_parallel import expert_ranks_refused
from scmdm.planner.duration import StepTime, step_time
from scmdm.planner.hardware import Assumptions, Cluster
from scmdm.planner.rank_memory import RankMemory, least_peak, rank_memory
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
    if layout.engine == "fsdp2" and workload.model.compile == "trunk":
        return "model.compile=trunk is not possible with engine=fsdp2"
    for key, value in (("fsdp.replicate", layout.replicate), ("fsdp.context", layout.context)):
        if layout.ranks % value:
            return f"{key}={value} does not divide {layout.ranks} GPUs"
    if (reason := expert_ranks_refused(workload.model, layout.experts)) is not None:
        return reason
    if layout.shards % layout.experts:
        return f"fsdp.experts={layout.experts} does not divide the {layout.shards} GPUs of a replica"
    for what, number in (("the length", workload.length), ("model.heads", workload.model.heads)):
        if number % layout.context:
            return f"fsdp.context={layout.context} does not divide {what} = {number}"
    if layout.context > 1 and workload.model.logit_shift:
        return f"fsdp.context={layout.context} is not possible with model.logit_shift=true"
    if layout.context > 1 and workload.block_length is not None:
        return f"fsdp.context={layout.context} is not possible with diffusion.block_length={workload.block_length}"
    parts = layout.ranks // layout.context * layout.micro_batch_size
    if workload.global_batch % parts:
        return (
            f"train.global_batch_size={workload.global_batch} is not a multiple of {layout.ranks // layout.context} x "
            f"train.micro_batch_size={layout.micro_batch_size}"
        )
    return None


def search(workload: Workload, start: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> SearchResult:
    """Search over micro-batch size, activation checkpointing, sharding, context and expert parallelism.

    Offloading is tried only if no other layout fits. Ranks of one node share experts and sequences; experts may also
    be shared by as many as in `start`. Engine, precision and compilation stay as in `start`.
    """
    layouts = [layout for layout in _layouts(workload, start, cluster) if impossible_because(workload, layout) is None]
    if not layouts:
        return SearchResult(None, 0, _why_none_is_possible(workload, start))
    kept = [layout for layout in layouts if not layout.offload]
    best, tried = _simplest(workload, kept, cluster, assumed), len(kept)
    if best is None:
        best = _simplest(workload, [layout for layout in layouts if layout.offload], cluster, assumed)
        tried = len(layouts)
    reason = _why_none_fits(workload, layouts, start, cluster, assumed) if best is None else None
    return SearchResult(best, tried, reason)


def _layouts(workload: Workload, start: ParallelLayout, cluster: Cluster) -> Iterator[ParallelLayout]:
    sizes = [2**power for power in range(workload.global_batch.bit_length())]
    kinds = [kind for kind in CHECKPOINTING if workload.model.compile != "block" or kind != "selective"]
    for size, kind, options in itertools.product(sizes, kinds, _options(workload, start, cluster)):
        yield dataclasses.replace(start, micro_batch_size=size, activation_checkpointing=kind, **options)


def _options(workload: Workload, start: ParallelLayout, cluster: Cluster) -> list[dict[str, Any]]:
    """Options of the engine to try, as fields of `ParallelLayout`."""
    if start.engine == "single":
        return [{}]
    if start.engine == "deepspeed":
        return [{"stage": stage} for stage in (1, 2, 3) if stage < 3 or workload.model.compile == "none"]
    replicates = [n for n in _powers(start.ranks) if start.ranks // n == 1 or _whole_nodes(start.ranks // n, cluster)]
    within_node = _powers(min(cluster.gpus_per_node, start.ranks))
    tried = {
        "replicate": replicates,
        "context": within_node,
        "experts": sorted({*within_node, start.experts}) if workload.model.experts else [start.experts],
        "reshard_after_estimate": (False, True) if workload.passes else (False,),
        "offload": (False, True),
    }
    return [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length())]


def _whole_nodes(ranks: int, cluster: Cluster) -> bool:
    return ranks % cluster.gpus_per_node == 0 or cluster.gpus_per_node % ranks == 0


def _simplest(
    workload: Workload, layouts: Sequence[ParallelLayout], cluster: Cluster, assumed: Assumptions
) -> Candidate | None:
    """Return the simplest of the fastest layouts that fit.

    Times are computed quickly, memory is measured: only that of layouts that can still be the result.
    """
    usable = usable_memory(cluster, assumed)
    seconds = {
        layout: step_time(workload, layout, cluster, assumed).seconds
        for layout in layouts
        if least_peak(workload, layout) <= usable
    }
    fits = functools.cache(lambda layout: rank_memory(workload, layout).peak.total <= usable)
    fastest = next((seconds[layout] for layout in sorted(seconds, key=seconds.__getitem__) if fits(layout)), None)
    if fastest is None:
        return None
    near = sorted((layout for layout in seconds if seconds[layout] <= fastest * _EQUAL), key=_complexity)
    for _, alike in itertools.groupby(near, key=_complexity):
        fitting = [evaluate(workload, layout, cluster, assumed) for layout in alike if fits(layout)]
        if fitting:
            return min(fitting, key=lambda candidate: candidate.memory.peak.total)
    raise AssertionError("the fastest layout is near itself")


def _complexity(layout: ParallelLayout) -> tuple[int, ...]:
    kind = CHECKPOINTING.index(layout.activation_checkpointing)
    split = (layout.context, layout.experts, layout.replicate)
    return (*split, kind, int(layout.reshard_after_estimate), -layout.micro_batch_size)


def _why_none_is_possible(workload: Workload, start: ParallelLayout) -> str:
    experts = 1 if workload.model.experts else start.experts
    smallest = dataclasses.replace(start, micro_batch_size=1, replicate=1, context=1, experts=experts)
    reason = f"no layout is possible: {impossible_because(workload, smallest)}"
    if workload.global_batch % start.ranks:
        reason += f"; choose a global batch that {start.ranks} ranks can share, or fewer GPUs"
    return reason


def _why_none_fits(
    workload: Workload, layouts: Sequence[ParallelLayout], start: ParallelLayout, cluster: Cluster, assumed: Assumptions
) -> str:
    least = _least_memory(workload, layouts)
    peak, usable = least.peak, usable_memory(cluster, assumed)
    largest = max(dataclasses.fields(peak), key=lambda field: getattr(peak, field.name)).name
    gib = 2**30
    return (
        f"none of {len(layouts)} layouts fits: the smallest needs {peak.total / gib:.1f} GiB of "
        f"{usable / gib:.1f} GiB, most of it {largest} ({getattr(peak, largest) / gib:.1f} GiB) at the "
        f"{least.peak_at}; {_remedy(workload, start, cluster, assumed)}"
    )


def _least_memory(workload: Workload, layouts: Sequence[ParallelLayout]) -> RankMemory:
    """Return the smallest memory of all layouts; those whose lower bound is larger are not measured."""
    bounds = {layout: least_peak(workload, layout) for layout in layouts if _recomputes(layout)}
    ordered = sorted(bounds, key=bounds.__getitem__)
    least = rank_memory(workload, ordered[0])
    for layout in ordered[1:]:
        if bounds[layout] >= least.peak.total:
            break
        least = min(least, rank_memory(workload, layout), key=lambda memory: memory.peak.total)
    return least


def _remedy(workload: Workload, start: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> str:
    factor = 2
    while start.engine != "single" and factor <= _LARGEST_FACTOR:
        larger = dataclasses.replace(cluster, nodes=cluster.nodes * factor)
        layouts = _layouts(workload, dataclasses.replace(start, ranks=larger.ranks), larger)
        possible = [one for one in layouts if impossible_because(workload, one) is None]
        if _any_fits(workload, possible, usable_memory(larger, assumed)):
            return f"it would fit on {larger.nodes} nodes"
        factor *= 2
    return "shorten the sequences, use a GPU with more memory, or shard with engine=fsdp2 on more of them"


def _any_fits(workload: Workload, layouts: Sequence[ParallelLayout], usable: float) -> bool:
    """Whether a layout fits; small ones, which are measured quickly and fit best, come first."""
    bounds = {layout: least_peak(workload, layout) for layout in layouts if _recomputes(layout)}
    possible = sorted((layout for layout, bound in bounds.items() if bound <= usable), key=bounds.__getitem__)
    return any(rank_memory(workload, layout).peak.total <= usable for layout in possible)


def _recomputes(layout: ParallelLayout) -> bool:
    """Whether a layout recomputes whole blocks, which needs the least memory of all kinds of checkpointing."""
    return layout.activation_checkpointing == "full"
