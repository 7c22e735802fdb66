"""Memory of a rank: what it holds between steps, and the most that it holds within one.

A step has five moments at which memory can be at its highest; each is a sum of the parts below, and the highest counts.
All positions are taken to be masked: with one sequence per micro-batch some rank will meet that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from scmdm.planner.activations import (
    block_backward,
    block_forward,
    head_chunk,
    head_width,
    kept_by_block,
    kept_by_conditioner,
    kept_by_final,
)
from scmdm.planner.model_state import FLOAT32, State, held_elements, rank_state
from scmdm.planner.workload import Layout, Parameter, Workload

ZERO_LIVE = 1_000_000_000  # elements that DeepSpeed's stage 3 keeps gathered in vanilla steps (`max_live_parameters`)
_ZERO_BUCKET = 500_000_000  # elements of DeepSpeed's buffer for gradients (`reduce_bucket_size`, its default)


@dataclass(frozen=True)
class Moment:
    """Bytes by part at one moment of a step."""

    weights: int = 0
    gradients: int = 0  # sharded, or the whole ones of an engine that keeps those
    moments: int = 0
    averages: int = 0
    gathered: int = 0  # whole weights, the buffers that they arrive in, and copies of weights in the compute dtype
    reduced: int = 0  # whole gradients on their way to the ranks that own them, and those that accumulate
    activations: int = 0  # kept for the backward pass
    head: int = 0  # the output head's chunks and gradients
    working: int = 0  # a block's forward or backward pass, with what checkpointing makes again
    estimate: int = 0  # of the clean state

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """Bytes of rank 0, which holds the most."""

    state: State
    steps: dict[str, Moment]  # of the device, by name
    host: int  # bytes in host memory (fsdp.offload)

    @property
    def peak_at(self) -> str:
        return max(self.steps, key=lambda name: self.steps[name].total)

    @property
    def peak(self) -> Moment:
        """At the highest moment."""
        return self.steps[self.peak_at]


def rank_memory(workload: Workload, layout: Layout) -> Memory:
    """Of rank 0."""
    state = rank_state(workload, layout)
    on_device = State(0, 0, 0, 0) if layout.offload else state
    parts = _Parts(workload, layout, on_device)
    steps = {
        "head of the loss pass": parts.head(),
        "first blocks backward": parts.backward(),
        "end of the backward pass": parts.end(),
        "update": parts.moment(gradients=on_device.gradients),
    }
    if workload.passes:
        steps = {"estimate": parts.estimate(), **steps}
    return Memory(state, steps, state.total if layout.offload else 0)


class _Parts:
    """The moments of a step."""

    def __init__(self, workload: Workload, layout: Layout, state: State) -> None:
        self._workload, self._layout, self._state = workload, layout, state
        self._weights = gathered_weights(workload, layout)
        accumulates = layout.micro_batches(workload) > 1
        # Without a reduction after every micro-batch FSDP2 and ZeRO's stage 1 keep gradients whole, in float32.
        zero = layout.engine == "deepspeed"
        trained = sum(parameter.numel for parameter in workload.trained) * FLOAT32
        whole = trained if layout.engine == "fsdp2" or (zero and layout.stage == 1) else 0
        self._accumulated = whole if accumulates else 0
        self._at_the_end = whole if zero else self._accumulated
        # DeepSpeed's buffers are made for the first gradients and stay until the update, in stage 3 for good.
        self._standing = self._weights.buckets if accumulates or layout.stage == 3 else 0
        self._earlier = state.gradients if accumulates and not whole else 0
        self._keeps = workload.passes > 0 and not layout.reshard_after_estimate
        self._estimate = self._estimate_bytes() if workload.passes else 0
        self._kept = kept_by_block(workload, layout) * workload.model.layers + kept_by_conditioner(workload, layout)

    def moment(self, **parts: int) -> Moment:
        state = self._state
        return Moment(weights=state.weights, moments=state.moments, averages=state.averages, **parts)

    def estimate(self) -> Moment:
        """The last no-grad pass in its head, or in a block."""
        weights, workload, layout = self._weights, self._workload, self._layout
        chunks = head_chunk(workload, layout)
        return self.moment(
            gradients=self._earlier,
            gathered=weights.casts
            + weights.rest
            + (weights.blocks if self._keeps else weights.block)
            + weights.buffers,
            reduced=self._accumulated + self._standing,
            head=max(0, chunks - block_forward(workload, layout)),
            working=block_forward(workload, layout),
            estimate=self._estimate,
        )

    def head(self) -> Moment:
        """All is kept that the backward pass needs, and the head works on its chunks; or the last block works, of which
        with `full` checkpointing nothing is kept."""
        weights, workload, layout = self._weights, self._workload, self._layout
        final = kept_by_final(workload, layout)
        head = head_chunk(workload, layout) + self._head_gradient(FLOAT32) + self._head_input()
        block = block_forward(workload, layout) if layout.activation_checkpointing == "full" else 0
        return self.moment(
            gradients=self._earlier,
            gathered=weights.casts + weights.rest + (0 if self._keeps else weights.buffers),
            reduced=self._accumulated + self._standing,
            activations=self._kept + final,
            head=head,
            working=max(0, block - head - final),
            # In the compute dtype it is what the conditioner keeps.
            estimate=self._estimate if weights.rest_width != layout.width else 0,
        )

    def backward(self) -> Moment:
        """A late block's backward pass: of the activations nothing has been freed yet, or one block's, for which then
        the gradients of the block after it are on their way."""
        weights, workload, layout = self._weights, self._workload, self._layout
        # Where gradients have accumulated, those on their way are no longer among them.
        on_their_way = max(0, weights.block_reduction - kept_by_block(workload, layout)) if not self._accumulated else 0
        return self.moment(
            gradients=self._earlier,
            gathered=weights.casts_backward + weights.rest + weights.block + weights.buffers,
            reduced=self._accumulated + weights.block_gradients + on_their_way + weights.buckets,
            activations=self._kept,
            head=2 * self._head_gradient(weights.rest_width),
            working=block_backward(workload, layout),
        )

    def end(self) -> Moment:
        """The last gradients: no activations are left."""
        weights = self._weights
        reduced = (self._at_the_end or weights.rest_gradients) + weights.rest_reduction + weights.buckets
        return self.moment(gradients=self._state.gradients, gathered=weights.rest, reduced=reduced)

    def _head_gradient(self, width: int) -> int:
        if self._workload.trained_layers is not None:
            return 0
        return self._workload.vocab_size * self._workload.model.width * width

    def _head_input(self) -> int:
        positions = self._layout.tokens(self._workload) * self._workload.model.width
        return 2 * positions * head_width(self._workload, self._layout)  # all positions, and the masked ones

    def _estimate_bytes(self) -> int:
        return self._layout.tokens(self._workload) * self._workload.model.width * self._weights.rest_width


@dataclass(frozen=True)
class GatheredWeights:
    """Bytes of whole weights and gradients beside a rank's own shards; all 0 where weights are whole anyway."""

    rest: int  # both embeddings, head, time embedding, conditioner
    block: int
    blocks: int  # all of them
    buffers: int  # that the collectives fill, before weights are copied out of them
    block_gradients: int
    block_reduction: int  # input of the reduce-scatter
    rest_gradients: int
    rest_reduction: int
    casts: int  # autocast's copies of whole float32 weights
    casts_backward: int  # those of them that the backward pass needs at once
    rest_width: int  # bytes of an element of the rest
    buckets: int = 0  # DeepSpeed's buffers for gradients


def gathered_weights(workload: Workload, layout: Layout) -> GatheredWeights:
    """Of one rank, by engine."""
    if layout.engine != "fsdp2":
        return _whole_weights(workload, layout)
    width = layout.width
    rest_width = head_width(workload, layout)
    units = workload.units()
    rest, block = (_padded(unit, layout.shards) for unit in units[:2])
    # Of a part, the last blocks are trained.
    trained = [tuple(p for p in unit if p.trained) for unit in (units[0], units[-1])]
    rest_trained, block_trained = (_padded(unit, layout.shards) for unit in trained)
    return GatheredWeights(
        rest=rest * rest_width,
        block=block * width,
        blocks=block * width * workload.model.layers,
        buffers=block * width,  # of the block before in a forward pass, of the next one in the backward pass
        block_gradients=block_trained * width,
        block_reduction=block_trained * FLOAT32,
        rest_gradients=rest_trained * rest_width,
        rest_reduction=rest_trained * FLOAT32,
        casts=0,
        casts_backward=0,
        rest_width=rest_width,
    )


def _padded(unit: tuple[Parameter, ...], shards: int) -> int:
    """Elements of parameters when every shard is as large as rank 0's."""
    return sum(held_elements(parameter, shards) * shards for parameter in unit)


def _whole_weights(workload: Workload, layout: Layout) -> GatheredWeights:
    """Of one process, and of DeepSpeed, whose stage 3 gathers one module at a time (and both embeddings).

    Autocast copies the weights of linear maps; those of checkpointed blocks are copied again, block by block.
    """
    rest, *blocks = (sum(p.numel for p in unit if _is_cast(p)) for unit in workload.units())
    copies = layout.width if layout.dtype != torch.float32 else 0
    casts = (rest + sum(blocks)) * copies
    once = casts if layout.activation_checkpointing == "none" else (rest + blocks[0]) * copies
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
        block_gradients=module,
        block_reduction=0,
        rest_gradients=module,
        rest_reduction=0,
        casts=0 if zero_3 else casts,
        casts_backward=0 if zero_3 else once,
        rest_width=FLOAT32,
        buckets=_zero_buckets(workload, layout) if layout.engine == "deepspeed" else 0,
    )


def _zero_buckets(workload: Workload, layout: Layout) -> int:
    """DeepSpeed's buffers for gradients, one for each type that they travel in; stages 1 and 2 keep all in float32."""
    widths = {layout.width if p.plain_linear else FLOAT32 for p in workload.parameters}
    return sum(width if layout.stage == 3 else FLOAT32 for width in widths) * _ZERO_BUCKET


def _is_cast(parameter: Parameter) -> bool:
    """Of a linear map that is called as one; embedding and head are cast by themselves."""
    return not parameter.name.startswith(("vocab_embed.", "output_layer.linear.")) and "norm" not in parameter.name
