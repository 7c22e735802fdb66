"""How long a step takes. Modelled, not measured: see `Assumptions` for all that it rests on.

Each part of a step takes as long as its computation or the collectives that run beside it, whichever is longer, and
then those that nothing runs beside.
"""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.models.flops import StepFlops, step_flops
from scmdm.planner.communication import BACKWARD, ESTIMATE, LOSS, UPDATE, Collective, step_collectives
from scmdm.planner.hardware import Assumptions, Cluster
from scmdm.planner.sharding import rank_state
from scmdm.planner.workload import Layout, Workload

_DAY = 86_400


@dataclass(frozen=True)
class PartTime:
    """Seconds of one part of a step."""

    compute: float
    beside: float  # collectives that overlap with the computation
    alone: float  # those that do not

    @property
    def total(self) -> float:
        return max(self.compute, self.beside) + self.alone


@dataclass(frozen=True)
class StepTime:
    parts: dict[str, PartTime]
    tokens: int  # of a global batch
    flops: StepFlops  # per rank and step, as `scmdm.models.flops` counts: without what checkpointing makes again
    peak_flops: float

    @property
    def seconds(self) -> float:
        return sum(part.total for part in self.parts.values())

    @property
    def exposed(self) -> float:
        """Seconds in which nothing is computed."""
        return self.seconds - sum(part.compute for part in self.parts.values())

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.seconds * _DAY

    @property
    def utilisation(self) -> float:
        """Of peak products, all passes counted."""
        return self.flops.total / self.seconds / self.peak_flops


def step_time(workload: Workload, layout: Layout, cluster: Cluster, assumed: Assumptions) -> StepTime:
    """Of one optimizer step, without data, validation and checkpoints."""
    per_sequence = step_flops(
        workload.model,
        workload.vocab_size,
        workload.length,
        workload.schedule,
        passes=workload.passes,
        trained_layers=workload.trained_layers,
    )
    share = workload.global_batch / layout.ranks
    forward, backward = per_sequence.forward * share, per_sequence.backward * share
    flops = StepFlops(forward, backward, per_sequence.estimate_passes * share)
    peak = cluster.gpu.flops(layout.dtype)
    again = forward if layout.activation_checkpointing == "full" else 0.0
    speed = peak * assumed.of_products(workload.model.width)
    compute = {
        ESTIMATE: flops.estimate_passes / speed,
        LOSS: forward / speed,
        BACKWARD: (backward + again) / speed,
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
    return StepTime(parts, workload.global_batch * workload.length, flops, peak)


def collective_seconds(one: Collective, cluster: Cluster, layout: Layout, assumed: Assumptions) -> float:
    """Of all `times` of a collective: latency of a ring's steps, and bytes over the narrowest link on its way.

    Between nodes all adapters of the node that belong to the group's ranks are used.
    """
    nodes, together = _placement(one, cluster, layout)
    rounds = 2 if one.kind == "all_reduce" else 1
    inter = rounds * (nodes - 1)
    latency = (
        assumed.base_latency
        + (rounds * (one.ranks - 1) - inter) * assumed.link_latency
        + inter * assumed.network_latency
    )
    network = together if one.kind != "all_to_all" else 1
    bandwidth = cluster.gpu.link if nodes == 1 else min(cluster.gpu.link, network * cluster.gpu.network)
    return one.times * latency + one.sent / (bandwidth * assumed.link_efficiency)


def _placement(one: Collective, cluster: Cluster, layout: Layout) -> tuple[int, int]:
    """How many nodes a group spans, and how many of its ranks are on one of them."""
    stride = layout.shards if one.group == "replicate" else 1
    together = max(1, min(one.ranks, cluster.gpus_per_node // stride))
    return -(-one.ranks // together), together


def _seconds(collectives: list[Collective], cluster: Cluster, layout: Layout, assumed: Assumptions) -> float:
    """Groups of different kinds work beside each other, those of one kind one after the other."""
    groups: dict[str, float] = {}
    for one in collectives:
        groups[one.group] = groups.get(one.group, 0.0) + collective_seconds(one, cluster, layout, assumed)
    return max(groups.values(), default=0.0)


def _update_seconds(workload: Workload, layout: Layout, cluster: Cluster, assumed: Assumptions) -> float:
    """The update only moves memory: gradients are read for their norm, scaled, and read; weights, moments and averages
    are read and written."""
    state = rank_state(workload, layout)
    moved = 4 * state.gradients + 2 * (state.weights + state.moments) + 2 * state.averages + state.weights
    bandwidth = cluster.gpu.memory_bandwidth * assumed.memory_efficiency
    return moved / (assumed.host_bandwidth if layout.offload else bandwidth)


def _host_seconds(part: str, workload: Workload, layout: Layout, cluster: Cluster, assumed: Assumptions) -> float:
    """Under fsdp.offload: shards come to the GPU whenever they are gathered, gradients go back."""
    if not layout.offload:
        return 0.0
    shard = rank_state(workload, layout).weights
    gathers = {
        one.part: one.times / (workload.model.layers * layout.micro_batches(workload))
        for one in step_collectives(workload, layout)
        if one.kind == "all_gather" and one.what == "blocks"
    }
    copies = gathers.get(part, 0.0) * layout.micro_batches(workload) + (1 if part == BACKWARD else 0)
    return copies * shard / (cluster.gpu.host_link * assumed.link_efficiency)
