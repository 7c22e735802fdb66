"""Collectives of one optimizer step: kind, number and size.

Small collectives (token counts, sample ids, times, loss, gradient norm) are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from scmdm.models.attention import exchanged_kv_heads
from scmdm.models.decoder_config import DecoderConfig
from scmdm.planner.sharding import FLOAT32, ZERO_LIVE, GatheredGroup, block_groups, gathered_weights
from scmdm.planner.workload import ParallelLayout, Workload

_EXTERNAL = ("vocab_embed.", "output_layer.linear.")  # weights that ZeRO-3 gathers in every call of the model
_COUNT = 8  # bytes of a number of rows
ESTIMATE, LOSS, BACKWARD, UPDATE = "estimate", "loss pass", "backward", "update"  # parts of a step


@dataclass(frozen=True)
class Collective:
    """A collective that is repeated within one part of a step."""

    kind: str  # all_gather | reduce_scatter | all_reduce | all_to_all
    what: str
    part: str
    group: str  # shard | replicate | context | experts | holders (of the same experts)
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
    found += _context(workload, layout) + _experts(workload, layout)
    return tuple(one for one in found if one.ranks > 1 and one.times)


def _fsdp(workload: Workload, layout: ParallelLayout) -> list[Collective]:
    weights, layers = gathered_weights(workload, layout), workload.model.layers
    shards, batches, blocks = layout.shards, layout.micro_batches(workload), block_groups(workload, layout)
    gathers = {ESTIMATE: 0, LOSS: 1, BACKWARD: 1}
    shared = dict(gathers)  # of the blocks that run once for all passes
    if workload.passes:
        # If weights stay gathered after the first pass, all forward passes use them.
        kept = not layout.reshard_after_estimate and not workload.copies_base
        gathers = {ESTIMATE: 1 if kept else workload.passes, LOSS: 0 if kept else 1, BACKWARD: 1}
    first = ESTIMATE if workload.passes else LOSS
    found = [Collective("all_gather", "rest", first, "shard", shards, weights.rest, batches)]
    for part in gathers:
        times = Counter[GatheredGroup]()
        for number, groups in enumerate(blocks):
            for group in groups:
                times[group] += (shared if number < workload.shared_layers else gathers)[part]
        for group, count in times.items():
            by = "holders" if group.what == "experts" else "shard"
            found.append(Collective("all_gather", group.what, part, by, group.ranks, group.weights, count * batches))
    # Adapters are in every block. Otherwise the last blocks are trained, or none.
    trained = blocks[layers - (workload.trained_layers or layers) :]
    reduced = Counter(group for groups in trained for group in groups)
    rest = GatheredGroup("rest", shards, weights.rest, weights.rest_reduction)
    for group, times_reduced in [(rest, 1), *reduced.items()]:
        by = "holders" if group.what == "experts" else "shard"
        size, what = group.gradients, group.what
        found.append(Collective("reduce_scatter", what, BACKWARD, by, group.ranks, size, times_reduced))
        shard = size // group.ranks
        found.append(Collective("all_reduce", what, BACKWARD, "replicate", layout.replicate, shard, times_reduced))
    return [one for one in found if one.size]


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


def _experts(workload: Workload, layout: ParallelLayout) -> list[Collective]:
    """All-to-alls of expert parallelism: numbers of rows, rows to the experts, and results back, with balanced loads.

    The backward pass sends gradients the same ways, and repeats the forward pass where activations are not kept.
    """
    if layout.experts == 1:
        return []
    model, again = workload.model, layout.activation_checkpointing != "none"
    assert isinstance(model, DecoderConfig)
    mixtures = range(model.dense_layers, model.layers)
    upper, backward = (
        sum(number >= first for number in mixtures) for first in (workload.shared_layers, workload.backward_from)
    )
    forward = {ESTIMATE: workload.passes * upper, LOSS: len(mixtures), BACKWARD: backward if again else 0}
    copies = layout.tokens(workload) * (1 if workload.block_length is None else 2) * model.experts_per_token
    rows, counts = copies * model.width * layout.width, model.experts * _COUNT

    def exchanged(what: str, part: str, size: int, times: int) -> Collective:
        batches = layout.micro_batches(workload)
        return Collective("all_to_all", what, part, "experts", layout.experts, size, times * batches, overlaps=False)

    return [
        one
        for part, times in forward.items()
        for one in (
            exchanged("expert counts", part, counts, times),
            exchanged("tokens", part, rows, 2 * (times + (backward if part == BACKWARD else 0))),
        )
    ]
