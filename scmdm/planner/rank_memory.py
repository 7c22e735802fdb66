"""Memory of a rank: training state between steps, and the peak within a step.

Memory can peak at six moments of a step. Each is a sum of the training state and of gathered weights (counted,
`scmdm.planner.sharding`), of activations (measured, `scmdm.planner.activation_memory`) and of the output head's logits
and gradients (the formulas below). All positions are assumed to be masked, which some rank will draw if a
micro-batch has one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from scmdm.planner.activation_memory import ActivationBytes, measure_activations
from scmdm.planner.sharding import (
    FLOAT32,
    TrainingState,
    gathered_weights,
    gathers_in_compute_dtype,
    head_width,
    rank_state,
)
from scmdm.planner.workload import ParallelLayout, Workload


@dataclass(frozen=True)
class Moment:
    """Bytes by part at one moment of a step."""

    weights: int = 0
    gradients: int = 0  # sharded, or whole if the engine does not shard them
    moments: int = 0
    averages: int = 0
    gathered: int = 0  # whole weights, and the buffers of their all-gathers
    reduced: int = 0  # whole gradients that are being reduced or accumulated
    activations: int = 0  # kept for the backward pass, with autocast's copies of weights
    head: int = 0  # logits and gradients of the output head
    working: int = 0  # temporary within a pass, including recomputed activations

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RankMemory:
    """Bytes of rank 0, which holds the most."""

    state: TrainingState
    steps: dict[str, Moment]  # on the device, by name of the moment
    host: int  # in host memory (fsdp.offload)

    @property
    def peak_at(self) -> str:
        """Name of the moment with the most memory."""
        return max(self.steps, key=lambda name: self.steps[name].total)

    @property
    def peak(self) -> Moment:
        """The moment with the most memory."""
        return self.steps[self.peak_at]


def rank_memory(workload: Workload, layout: ParallelLayout) -> RankMemory:
    """Return the memory of rank 0."""
    return _rank_memory(workload, layout, _activations(workload, layout))


def least_peak(workload: Workload, layout: ParallelLayout) -> int:
    """Return a lower bound of the peak of `rank_memory`, computed without measuring activations.

    It counts the inputs of all blocks, which every kind of checkpointing keeps.
    """
    kept = 0
    if workload.trained_layers is None:
        width = FLOAT32 if workload.model.residual_precision == "float32" else layout.width
        kept = workload.model.layers * layout.tokens(workload) * workload.model.width * width
    return _rank_memory(workload, layout, ActivationBytes(0, 0, kept, kept, kept, kept)).peak.total


def _rank_memory(workload: Workload, layout: ParallelLayout, found: ActivationBytes) -> RankMemory:
    state = rank_state(workload, layout)
    on_device = TrainingState(0, 0, 0, 0) if layout.offload else state
    parts = _StepParts(workload, layout, on_device, found)
    steps = {
        "head of the loss pass": parts.head(),
        "backward pass of the last layers": parts.first_backward(),
        "backward pass of the first layer": parts.last_backward(),
        "end of the backward pass": parts.end(),
        "update": parts.moment(gradients=on_device.gradients),
    }
    if workload.passes:
        steps = {"estimate": parts.estimate(), **steps}
    return RankMemory(state, steps, state.total if layout.offload else 0)


def _activations(workload: Workload, layout: ParallelLayout) -> ActivationBytes:
    # Memory depends on a rank's number of positions only, so slices of many sequences equal fewer whole ones.
    shared = math.gcd(layout.micro_batch_size, layout.context)
    return measure_activations(
        replace(workload.model, activation_checkpointing=layout.activation_checkpointing),
        rows=layout.micro_batch_size // shared,
        length=workload.length * shared // layout.context,
        dtype=layout.dtype,
        gathered=gathers_in_compute_dtype(layout),
        passes=workload.passes,
        trained_layers=workload.trained_layers,
        gpu=layout.gpu,
        block_length=workload.block_length,
        shared_layers=workload.shared_layers,
        experts=layout.experts,
    )


def head_logits(workload: Workload, layout: ParallelLayout) -> int:
    """Bytes of a chunk of logits, with every position masked.

    On a GPU, logits and softmax exist together in the dtype of the head. On a CPU, everything is computed in place in
    float32, with a copy in the dtype of the head for matrix products.
    """
    rows = min(layout.tokens(workload), workload.model.head_chunk)
    width = head_width(workload, layout)
    per_logit = 2 * width if layout.gpu else FLOAT32 + (width if width < FLOAT32 else 0)
    return per_logit * rows * workload.vocab_size


class _StepParts:
    """The moments of a step."""

    def __init__(
        self, workload: Workload, layout: ParallelLayout, state: TrainingState, activations: ActivationBytes
    ) -> None:
        self._workload, self._layout, self._state = workload, layout, state
        self._gathered, self._activations = gathered_weights(workload, layout), activations
        accumulates = layout.micro_batches(workload) > 1
        # Engines that do not reduce after every micro-batch accumulate whole gradients in float32.
        zero = layout.engine == "deepspeed"
        held = [p.numel // layout.experts if p.routed else p.numel for p in workload.trained]
        trained = sum(held) * FLOAT32
        whole = trained if layout.engine == "fsdp2" or (zero and layout.stage == 1) else 0
        self._accumulated = whole if accumulates else 0
        self._gradients_at_end = whole if zero else self._accumulated
        # DeepSpeed allocates its buffers for the first gradients, and frees them at the update (stage 3: never).
        self._standing_buffers = self._gathered.buckets if accumulates or layout.stage == 3 else 0
        self._earlier_gradients = state.gradients if accumulates and not whole else 0
        self._block_gradients = sum(p.numel for p in workload.units()[-1] if p.trained) * FLOAT32
        self._keeps_gathered = workload.passes > 0 and not layout.reshard_after_estimate

    def moment(self, **parts: int) -> Moment:
        """A moment with the training state, except gradients, and these parts."""
        state = self._state
        return Moment(weights=state.weights + state.base, moments=state.moments, averages=state.averages, **parts)

    def estimate(self) -> Moment:
        """Peak of the last pass that computes the estimate: in its blocks, or in its head."""
        gathered, found = self._gathered, self._activations
        hidden = self._workload.model.carried == "hidden"
        logits = 0 if hidden else head_logits(self._workload, self._layout)
        in_head = found.estimate_head + logits >= found.estimate_blocks
        return self.moment(
            gradients=self._earlier_gradients,
            gathered=gathered.rest + (gathered.blocks if self._keeps_gathered else gathered.block) + gathered.buffers,
            reduced=self._accumulated + self._standing_buffers,
            head=logits if in_head else 0,
            working=found.estimate_head if in_head else found.estimate_blocks,
        )

    def head(self) -> Moment:
        """Peak of the loss pass: in its head, with everything kept for the backward pass, or in its last block."""
        gathered, found = self._gathered, self._activations
        head = head_logits(self._workload, self._layout) + self._head_gradient(FLOAT32)
        in_head = found.loss_head + head >= found.loss_blocks
        peak = found.loss_head if in_head else found.loss_blocks
        # Blocks are freed as the pass proceeds.
        return self.moment(
            gradients=self._earlier_gradients,
            gathered=gathered.rest + (0 if self._keeps_gathered else gathered.buffers),
            reduced=self._accumulated + self._standing_buffers,
            activations=found.kept,
            head=head if in_head else 0,
            working=max(0, peak - found.kept),
        )

    def last_backward(self) -> Moment:
        """Peak in the backward pass of the first layer: all gradients exist, and the activations of one block."""
        gathered, found = self._gathered, self._activations
        return self.moment(
            gradients=self._state.gradients - (self._block_gradients if not gathered.block else 0),
            gathered=gathered.rest + gathered.block,
            reduced=self._accumulated + gathered.buckets,
            activations=found.kept_by_block,
            working=max(0, found.backward - found.kept),
        )

    def first_backward(self) -> Moment:
        """Peak in the backward pass of the last layers: hardly any activation has been freed."""
        gathered, found = self._gathered, self._activations
        # By the time the second block's gradients are reduced, the first one's activations are freed.
        in_reduction = max(0, gathered.block_reduction - found.kept_by_block) if not self._accumulated else 0
        return self.moment(
            gradients=self._earlier_gradients,
            gathered=gathered.rest + gathered.block + gathered.buffers,
            reduced=self._accumulated + in_reduction + gathered.buckets,
            activations=found.kept,
            head=2 * self._head_gradient(gathered.rest_width),
            working=max(0, found.backward - found.kept),
        )

    def end(self) -> Moment:
        """Peak at the last gradients: no activations are left."""
        gathered = self._gathered
        reduced = (self._gradients_at_end or gathered.rest_gradients) + gathered.rest_reduction + gathered.buckets
        return self.moment(gradients=self._state.gradients, gathered=gathered.rest, reduced=reduced)

    def _head_gradient(self, width: int) -> int:
        """Bytes of the gradient of the output head's weight."""
        if self._workload.trained_layers is not None:
            return 0
        return self._workload.vocab_size * self._workload.model.width * width
