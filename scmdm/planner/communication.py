"""Collectives of one optimizer step: kind, number and size.

Small collectives (token counts, sample ids, times, loss, gradient norm) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.models.attention import exchanged_kv_heads
from scmdm.planner.sharding import FLOAT32, ZERO_LIVE, gathered_weights
from scmdm.planner.workload import ParallelLayout, Workload

_EXTERNAL = ("vocab_embed.", "output_layer.linear.")  # weights that ZeRO-3 gathers in every call of the model
ESTIMATE, LOSS, BACKWARD, UPDATE = "estimate", "loss pass", "backward", "update"  # parts of a step


@dataclass(frozen=True)
class Collective:
    """A collective that is repeated within one part of a step."""

    kind: str  # all_gather | reduce_scatter | all_reduce | all_to_all
    what: str
    part: str
    group: str  # shard | replicate | context
    ranks: int  # size of the group
    size: int  # bytes of the whole tensor; all_to_all: bytes that a rank exchanges
    times: int  # per optimizer step
    overlaps: bool = True  # overlaps with the computation of its part

    @property
    def sent(self) -> int:
        """Bytes that each rank sends in a step, with ring algorithms."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.size * self.times * (self.ranks - 1) // self.ranks


def step_collectives(workload: Workload, layout: ParallelLayout) -> tuple[Collective, ...]:
    """Return the collectives of one step in the order of its parts."""
    found = {"single": lambda *_: [], "fsdp2": _fsdp, "deepspeed": _zero}[layout.engine](workload, layout)
    found += _context(workload, layout)
    return tuple(one for one in found if one.ranks > 1 and one.times)


def _fsdp(workload: Workload, layout: ParallelLayout) -> list[Collective]:
    weights, layers = gathered_weights(workload, layout), workload.model.layers
    shards, batches = layout.shards, layout.micro_batches(workload)
    block = weights.blocks // layers
    gathers = {ESTIMATE: 0, LOSS: layers, BACKWARD: layers}
    if workload.passes:
        upper = layers - workload.shared_layers
        # If weights stay gathered after the first pass, all forward passes use them.
        gathers = {ESTIMATE: workload.passes * upper, LOSS: layers, BACKWARD: layers}
        if not layout.reshard_after_estimate and not workload.copies_base:
            gathers = {ESTIMATE: upper, LOSS: workload.shared_layers, BACKWARD: layers}
    first = ESTIMATE if workload.passes else LOSS
    found = [Collective("all_gather", "rest", first, "shard", shards, weights.rest, batches)]
    for part, times in gathers.items():
        found.append(Collective("all_gather", "blocks", part, "shard", shards, block, times * batches))
    # Adapters are in every block. Otherwise the last blocks are trained, or none.
    trained = (workload.trained_layers or layers) if weights.block_reduction else 0
    for what, size, times in (("rest", weights.rest_reduction, 1), ("blocks", weights.block_reduction, trained)):
        found.append(Collective("reduce_scatter", what, BACKWARD, "shard", shards, size, times))
        shard = size // shards
        found.append(Collective("all_reduce", what, BACKWARD, "replicate", layout.replicate, shard, times))
    return found


def _zero(workload: Workload, layout: ParallelLayout) -> list[Collective]:
    if layout.stage == 3:
        return _zero_3(workload, layout)
    ranks = layout.ranks
    reduced = sum(p.numel * (layout.width if p.plain_linear else FLOAT32) for p in workload.parameters)
    # Stage 2 reduces after every micro-batch, stage 1 once. Both all-reduce buckets and keep the rank's part.
    times = layout.micro_batches(workload) if layout.stage == 2 else 1
    return [
        Collective("all_reduce", "gradients", BACKWARD, "shard", ranks, reduced, times, overlaps=False),
        Collective("all_gather", "weights", UPDATE, "shard", ranks, workload.numel * FLOAT32, 1, overlaps=False),
    ]


def _zero_3(workload: Workload, layout: ParallelLayout) -> list[Collective]:
    ranks, batches = layout.ranks, layout.micro_batches(workload)
    padded = {p: -(-p.numel // ranks) * ranks for p in workload.parameters}
    width = {p: layout.width if p.plain_linear else FLOAT32 for p in workload.parameters}
    large = [p for p in workload.parameters if p.numel > layout.param_persistence_threshold]
    gathered = sum(padded[p] * width[p] for p in large)
    shared = {p for p in large if p.block is not None and p.block < workload.shared_layers}
    upper = gathered - sum(padded[p] * width[p] for p in shared)
    persistent = sum(padded[p] * width[p] for p in workload.parameters if p.numel <= layout.param_persistence_threshold)
    reduced = sum(padded[p] * width[p] for p in workload.parameters)
    overlaps = not workload.passes  # with several passes DeepSpeed prefetches nothing
    # The backward pass of a vanilla step reuses the weights that its forward pass gathered, up to a limit.
    again = 0 if not workload.passes and workload.numel <= ZERO_LIVE else 1
    found = [
        Collective("all_gather", "weights", part, "shard", ranks, size, times * batches, overlaps=overlaps)
        for part, size, times in (
            (ESTIMATE, upper, workload.passes),
            (LOSS, gathered, 1),
            (BACKWARD, gathered, again),
        )
    ]
    # The shared blocks run in a call of their own, for which DeepSpeed gathers embedding and head, too.
    rest = sum(padded[p] * width[p] for p in large if p.block is None and p.name.startswith(_EXTERNAL))
    return [
        *found,
        Collective("all_gather", "rest", LOSS, "shard", ranks, rest, batches if shared else 0, overlaps=overlaps),
        Collective("reduce_scatter", "gradients", BACKWARD, "shard", ranks, reduced, batches),
        Collective("all_gather", "small weights", UPDATE, "shard", ranks, persistent, 1, overlaps=False),
    ]


def _context(workload: Workload, layout: ParallelLayout) -> list[Collective]:
    """Two all-to-alls around every block's attention: one of queries, keys and values, one of the output."""
    if layout.context == 1:
        return []
    batches, again = layout.micro_batches(workload), layout.activation_checkpointing != "none"
    model, per_channel = workload.model, layout.tokens(workload) * layout.width
    kv_heads = exchanged_kv_heads(model.heads, model.kv_width // model.head_dim, layout.context)
    channels = {"q, k, v": model.attention_width + 2 * kv_heads * model.head_dim, "attention": model.attention_width}
    upper, layers = model.layers - workload.shared_layers, model.layers
    rounds = {ESTIMATE: workload.passes * upper, LOSS: layers, BACKWARD: 2 * layers if again else layers}
    return [
        Collective(
            "all_to_all",
            what,
            part,
            "context",
            layout.context,
            number * per_channel,
            times * batches,
            overlaps=False,
        )
        for part, times in rounds.items()
        for what, number in channels.items()
    ]
