"""Phases of a run besides its steps: opening, validation, saving, and then sampling and evaluation of the model.

Memory of a validation is that of a forward pass without gradients, measured as in `scmdm.planner.activation_memory`.
Batch sizes and memory of sampling and evaluation are those of the rule by which these commands choose them
(`scmdm.sampling.batch_size`). Durations are modelled as those of steps: computation or gathering, whichever takes
longer; files at the bandwidth that the file system has for all ranks together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scmdm.config.planning import PhaseSettings
from scmdm.models.flops import step_flops
from scmdm.planner.activation_memory import measure_activations
from scmdm.planner.communication import BACKWARD, step_collectives
from scmdm.planner.duration import collective_seconds
from scmdm.planner.hardware import Assumptions, Cluster
from scmdm.planner.rank_memory import head_logits
from scmdm.planner.search import usable_memory
from scmdm.planner.sharding import FLOAT32, gathered_weights, gathers_in_compute_dtype, rank_state
from scmdm.planner.workload import ParallelLayout, Workload
from scmdm.sampling.batch_size import (
    LARGEST_BATCH,
    LARGEST_NELBO_BATCH,
    batch_size_for,
    copied_bytes,
    evaluation_bytes,
    even_batch_size,
)

_GB = 1e9


@dataclass(frozen=True)
class Phase:
    """One phase on rank 0."""

    name: str
    memory: int  # peak bytes on the device
    seconds: float
    fits: bool
    batch_size: int = 0  # sequences at once; 0: none are evaluated
    sequences: int = 0  # of this rank
    transferred: int = 0  # bytes that this rank reads or writes
    stall: float = 0.0  # seconds for which training waits, where it is not the whole phase
    weights: str = ""  # how a model that is not trained is held


def plan_phases(
    workload: Workload,
    layout: ParallelLayout,
    cluster: Cluster,
    assumed: Assumptions,
    settings: PhaseSettings,
    *,
    validation_samples: int,
    adapts: bool,
) -> tuple[Phase, ...]:
    """Return the phases of a run in order: `adapts` adds opening a base, `validation_samples` > 0 a validation."""
    phases = _Phases(workload, layout, cluster, assumed, settings)
    return (
        *([phases.open_base()] if adapts else []),
        phases.resume(),
        *([phases.validation(validation_samples)] if validation_samples else []),
        phases.save(),
        phases.sampling(),
        phases.evaluation(),
    )


class _Phases:
    def __init__(
        self,
        workload: Workload,
        layout: ParallelLayout,
        cluster: Cluster,
        assumed: Assumptions,
        settings: PhaseSettings,
    ) -> None:
        self._workload, self._layout, self._settings = workload, layout, settings
        self._cluster, self._assumed = cluster, assumed
        state = rank_state(workload, layout)
        self._state = dataclasses.replace(state, weights=0, moments=0, averages=0, base=0) if layout.offload else state
        self._kept = state.weights + state.moments + state.averages  # in a checkpoint, of this rank's shard
        self._flops = step_flops(
            workload.model,
            workload.vocab_size,
            workload.length,
            workload.schedule,
            passes=max(1, workload.passes),
            trained_layers=workload.trained_layers,
            block_length=workload.block_length,
            shared_layers=workload.model.inject_layer,  # the modes of a likelihood see the same state
        )

    def open_base(self) -> Phase:
        """Verify a share of the base's weights and read this rank's shard."""
        whole = self._workload.numel * FLOAT32
        own = rank_state(self._workload, self._layout).weights
        return self._files("open the base", whole // self._layout.ranks + own, self._state.weights)

    def resume(self) -> Phase:
        """Verify a share of a checkpoint and read this rank's shard."""
        share = self._kept * self._layout.shards // self._layout.ranks
        return self._files("open a checkpoint", share + self._kept, self._resident())

    def save(self) -> Phase:
        """Write this rank's shard, once for all replicas; training waits for the copy to host memory."""
        own = self._kept * self._layout.shards // self._layout.ranks
        phase = self._files("save", own, self._resident() + self._state.gradients)
        link = self._cluster.gpu.host_link * self._assumed.link_efficiency
        return dataclasses.replace(phase, stall=own / link)

    def validation(self, samples: int) -> Phase:
        """Evaluate this rank's share of the sequences, one micro-batch at a time, with averaged weights."""
        layout, gathered = self._layout, gathered_weights(self._workload, self._layout)
        blocks = gathered.block if layout.reshard_after_estimate else gathered.blocks
        # While the averages are in the model, the weights that are trained are kept beside them.
        swapped = self._state.averages and self._state.weights
        forward = self._forward_bytes(layout.micro_batch_size, gathered=gathers_in_compute_dtype(layout))
        memory = self._resident() + swapped + gathered.rest + blocks + gathered.buffers + forward
        sequences = -(-samples * layout.context // layout.ranks)
        batches = -(-sequences // layout.micro_batch_size)
        compute = sequences * self._likelihood_flops() / layout.context / self._speed()
        gathers = batches * len(self._modes()) * self._gather_seconds()
        return self._phase("validation", memory, max(compute, gathers), layout.micro_batch_size, sequences)

    def sampling(self) -> Phase:
        """Draw this rank's share of the samples."""
        flops = self._flops
        evaluation = max(flops.estimate_passes, flops.forward) if self._workload.passes else flops.forward
        count = self._settings.samples
        return self._of_a_model("sampling", count, evaluation * self._settings.sampler_steps, LARGEST_BATCH)

    def evaluation(self) -> Phase:
        """Estimate the NELBO in every mode, then draw samples."""
        settings = self._settings
        flops = self._likelihood_flops() * settings.nelbo_draws
        nelbo = self._of_a_model("evaluation", settings.nelbo_samples, flops, LARGEST_NELBO_BATCH)
        sampling = self.sampling()
        return dataclasses.replace(nelbo, seconds=nelbo.seconds + sampling.seconds)

    def _of_a_model(self, name: str, count: int, flops: float, most: int) -> Phase:
        """A phase of `count` sequences with a model that is not trained, on all ranks, in the first way that fits."""
        phase = None
        for width, shards in self._ways():
            phase = self._with_weights(name, count, flops, most, width=width, shards=shards)
            if phase.fits:
                return phase
        assert phase is not None
        return phase

    def _with_weights(self, name: str, count: int, flops: float, most: int, *, width: int, shards: int) -> Phase:
        """The phase with weights of `width` bytes per number that `shards` GPUs share."""
        workload, computed = self._workload, self._layout.width
        sequences = -(-count // self._layout.ranks)
        weights = workload.numel * width // shards + copied_bytes(workload.numel, held=width, computed=computed)
        if shards > 1:  # two blocks and the rest are whole
            rest, block = (sum(parameter.numel for parameter in unit) for unit in workload.units()[:2])
            weights += (rest + 2 * block) * width
        needed = partial(
            evaluation_bytes,
            model=workload.model,
            length=workload.length,
            vocab_size=workload.vocab_size,
            bytes_per_number=computed,
        )
        free = int(usable_memory(self._cluster, self._assumed)) - weights
        rows = even_batch_size(sequences, 1, batch_size_for(free, needed, most))
        memory = weights + needed(rows)
        where = f"sharded over {shards} GPUs" if shards > 1 else "on each GPU"
        held = f"{'bfloat16' if width < FLOAT32 else 'float32'}, {where}"
        phase = self._phase(name, memory, sequences * flops / self._speed(), rows, sequences)
        return dataclasses.replace(phase, weights=held)

    def _ways(self) -> Iterator[tuple[int, int]]:
        """Bytes per number and GPUs that share a model, the simplest first."""
        yield FLOAT32, 1
        if self._layout.dtype == torch.bfloat16:
            yield self._layout.width, 1
        for power in range(1, min(self._layout.ranks, self._cluster.gpus_per_node).bit_length()):
            yield self._layout.width, 2**power

    def _forward_bytes(self, rows: int, *, gathered: bool) -> int:
        """Peak bytes of a pass of a micro-batch without gradients, beside the weights."""
        shared = math.gcd(rows, self._layout.context)
        length = self._workload.length * shared // self._layout.context
        blocks, head = self._measured(rows // shared, length, gathered)
        logits = head_logits(self._workload, dataclasses.replace(self._layout, micro_batch_size=rows))
        return max(blocks, head + logits)

    def _measured(self, rows: int, length: int, gathered: bool) -> tuple[int, int]:
        """Bytes in the blocks and in the head of a pass that computes the estimate."""
        workload = self._workload
        found = measure_activations(
            # A vanilla model is measured as a conditioned one, which needs a little more.
            dataclasses.replace(workload.model, self_conditioned=True, activation_checkpointing="none"),
            rows=rows,
            length=length,
            dtype=self._layout.dtype,
            gathered=gathered,
            passes=1,
            trained_layers=workload.trained_layers,
            gpu=self._layout.gpu,
            block_length=workload.block_length,
            experts=self._layout.experts,
        )
        return found.estimate_blocks, found.estimate_head

    def _resident(self) -> int:
        return self._state.weights + self._state.moments + self._state.averages + self._state.base

    def _modes(self) -> tuple[int, ...]:
        """Passes that compute the estimate, in each mode of a likelihood."""
        return (0, self._workload.passes) if self._workload.passes else (0,)

    def _likelihood_flops(self) -> float:
        """Operations per sequence in all modes."""
        flops = self._flops
        return sum(flops.forward + (flops.estimate_passes if passes else 0.0) for passes in self._modes())

    def _speed(self) -> float:
        peak = self._cluster.gpu.flops(self._layout.dtype)
        return peak * self._assumed.product_efficiency(self._workload.model.width)

    def _gather_seconds(self) -> float:
        """Seconds to gather all weights for one batch."""
        batches = self._layout.micro_batches(self._workload)
        collectives = step_collectives(self._workload, self._layout)
        gathers = [one for one in collectives if one.kind == "all_gather"]
        first = next((one.part for one in gathers if one.part != BACKWARD), None)
        return sum(
            collective_seconds(one, self._cluster, self._layout, self._assumed) / batches
            for one in gathers
            if one.part == first
        )

    def _files(self, name: str, bytes_: int, memory: int) -> Phase:
        """A phase in which every rank transfers as much, over a file system that all ranks share."""
        seconds = bytes_ * self._layout.ranks / (self._settings.file_system * _GB)
        return dataclasses.replace(self._phase(name, memory, seconds), transferred=bytes_)

    def _phase(self, name: str, memory: int, seconds: float, batch_size: int = 0, sequences: int = 0) -> Phase:
        fits = memory <= usable_memory(self._cluster, self._assumed)
        return Phase(name, memory, seconds, fits, batch_size, sequences)
