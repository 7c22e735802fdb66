"""Duration of a step: modelled, not measured, under the `Assumptions` of `scmdm.planner.hardware`.

Each part of a step takes the longer of its computation and the collectives that overlap with it, plus the collectives
that do not overlap.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from scmdm.models.flops import StepFlops, block_flops, step_flops
from scmdm.planner.communication import BACKWARD, ESTIMATE, LOSS, UPDATE, Collective, step_collectives
from scmdm.planner.hardware import Assumptions, Cluster
from scmdm.planner.sharding import rank_state
from scmdm.planner.workload import ParallelLayout, Workload

_DAY = 86_400


@dataclass(frozen=True)
class PartTime:
    """Seconds of one part of a step."""

    compute: float
    beside: float  # collectives that overlap with the computation
    alone: float  # collectives that do not overlap

    @property
    def total(self) -> float:
        """Seconds of the part."""
        return max(self.compute, self.beside) + self.alone


@dataclass(frozen=True)
class StepTime:
    """Duration of an optimizer step."""

    parts: dict[str, PartTime]
    tokens: int  # per global batch
    ideal: float  # seconds of a rank's operations, without recomputed ones, at the peak of the dtypes that they are in

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return sum(part.total for part in self.parts.values())

    @property
    def exposed(self) -> float:
        """Seconds without computation."""
        return self.seconds - sum(part.compute for part in self.parts.values())

    @property
    def tokens_per_day(self) -> float:
        """Training tokens per day."""
        return self.tokens / self.seconds * _DAY

    @property
    def utilisation(self) -> float:
        """Fraction of peak FLOP/s, counting all passes."""
        return self.ideal / self.seconds


def step_time(workload: Workload, layout: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> StepTime:
    """Model one optimizer step, without data loading, validation and checkpoints."""
    passes: dict[str, Any] = {
        "passes": workload.passes,
        "trained_layers": workload.trained_layers,
        "block_length": workload.block_length,
        "shared_layers": workload.shared_layers,
    }
    share = workload.global_batch / layout.ranks
    flops = _times(share, step_flops(workload.model, workload.vocab_size, workload.length, workload.schedule, **passes))
    blocks = _times(share, block_flops(workload.model, workload.length, **passes))
    ideal = _at_peak(flops, blocks, workload, cluster, layout)
    again = ideal.forward if layout.activation_checkpointing == "full" else 0.0
    efficiency = assumed.product_efficiency(workload.model.width)
    compute = {
        ESTIMATE: ideal.estimate_passes / efficiency,
        LOSS: ideal.forward / efficiency,
        BACKWARD: (ideal.backward + again) / efficiency,
        UPDATE: _update_seconds(workload, layout, cluster, assumed),
    }
    collectives = step_collectives(workload, layout)
    parts = {
        name: PartTime(
            seconds,
            _seconds([one for one in collectives if one.part == name and one.overlaps], cluster, layout, assumed)
            + _host_seconds(name, workload, layout, cluster, assumed),
            _seconds([one for one in collectives if one.part == name and not one.overlaps], cluster, layout, assumed),
        )
        for name, seconds in compute.items()
    }
    return StepTime(parts, workload.global_batch * workload.length, ideal.total)


def _times(factor: float, flops: StepFlops) -> StepFlops:
    return StepFlops(*(factor * count for count in astuple(flops)))


def _at_peak(
    flops: StepFlops, blocks: StepFlops, workload: Workload, cluster: Cluster, layout: ParallelLayout
) -> StepFlops:
    """Return the seconds of operations, of which `blocks` are in the products of linear maps, at the peak FLOP/s."""
    peak = block_peak = cluster.gpu.flops(layout.dtype)
    if workload.model.matmul_precision == "fp8":
        assert cluster.gpu.fp8_flops is not None, "`make_plan` refuses such GPUs"
        block_peak = cluster.gpu.fp8_flops
    pairs = zip(astuple(flops), astuple(blocks), strict=True)
    return StepFlops(*((whole - part) / peak + part / block_peak for whole, part in pairs))


def collective_seconds(one: Collective, cluster: Cluster, layout: ParallelLayout, assumed: Assumptions) -> float:
    """Seconds of all repetitions of a collective: latency of the ring's steps, and bytes over the slowest link.

    Between nodes, a collective uses the network adapters of all of the group's ranks on a node.
    """
    nodes, per_node = _placement(one, cluster, layout)
    rounds = 2 if one.kind == "all_reduce" else 1
    inter = rounds * (nodes - 1)
    latency = (
        assumed.base_latency
        + (rounds * (one.ranks - 1) - inter) * assumed.link_latency
        + inter * assumed.network_latency
    )
    adapters = per_node if one.kind != "all_to_all" else 1
    bandwidth = cluster.gpu.link if nodes == 1 else min(cluster.gpu.link, adapters * cluster.gpu.network)
    return one.times * latency + one.sent / (bandwidth * assumed.link_efficiency)


def _placement(one: Collective, cluster: Cluster, layout: ParallelLayout) -> tuple[int, int]:
    """Return the number of nodes that a group spans, and the number of its ranks per node."""
    stride = {"replicate": layout.shards, "holders": layout.experts}.get(one.group, 1)
    per_node = max(1, min(one.ranks, cluster.gpus_per_node // stride))
    return -(-one.ranks // per_node), per_node


def _seconds(collectives: list[Collective], cluster: Cluster, layout: ParallelLayout, assumed: Assumptions) -> float:
    """Seconds of collectives: those of different groups overlap, those of one group run one after another."""
    groups: dict[str, float] = {}
    for one in collectives:
        groups[one.group] = groups.get(one.group, 0.0) + collective_seconds(one, cluster, layout, assumed)
    return max(groups.values(), default=0.0)


def _update_seconds(workload: Workload, layout: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> float:
    """Seconds of the optimizer's update, which is bound by memory bandwidth.

    Gradients are read for their norm, scaled and read again; weights, moments and averages are read and written. Frozen
    weights are left alone: those that are updated have as many bytes as their gradients.
    """
    state = rank_state(workload, layout)
    weights = state.weights if workload.trained_layers is None else state.gradients
    moved = 4 * state.gradients + 2 * (weights + state.moments) + 2 * state.averages + weights
    bandwidth = cluster.gpu.memory_bandwidth * assumed.memory_efficiency
    return moved / (assumed.host_bandwidth if layout.offload else bandwidth)


def _host_seconds(
    part: str, workload: Workload, layout: ParallelLayout, cluster: Cluster, assumed: Assumptions
) -> float:
    """Seconds of copies between host and device under fsdp.offload: shards before each gather, gradients back."""
    if not layout.offload:
        return 0.0
    shard = rank_state(workload, layout).weights
    times = sum(
        one.times
        for one in step_collectives(workload, layout)
        if (one.kind, one.what, one.part) == ("all_gather", "blocks", part)
    )
    copies = times / workload.model.layers + (1 if part == BACKWARD else 0)
    return copies * shard / (cluster.gpu.host_link * assumed.link_efficiency)
