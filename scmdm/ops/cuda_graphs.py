"""Denoiser evaluations replayed as CUDA graphs: one launch by the host instead of hundreds.

With small batches a GPU waits for the host to launch kernels. A graph has fixed shapes and fixed memory, so one is
recorded for each shape that recurs, as in every step of a self-conditioned sampler; other shapes run without a graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from scmdm.diffusion.guidance import SamplingDenoiser
from scmdm.diffusion.state import State

_WARMUP = 2  # evaluations before a shape is recorded, in which kernels are chosen and compiled
_MAX_GRAPHS = 8  # a vanilla sampler skips sequences, and therefore has many shapes
_TENSORS = ("z_BL", "t_B", "estimate_BLD", "labels_B", "clean_BL")
_NOT_RECORDED = ("packing", "window", "visible_LL", "lower", "next_BL", "perturbation_BLD")

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]


class ReplayedDenoiser:
    """A denoiser whose `hidden` is replayed from CUDA graphs where its shape recurs.

    The wrapped denoiser is the reference and runs everything else. Its weights must not change. Use within one thread,
    one autocast context, and without gradients. `record` turns a function into its replay; the default is
    `CudaRecorder`.
    """

    def __init__(self, denoiser: SamplingDenoiser, record: Record | None = None) -> None:
        self.denoiser, self.record = denoiser, record or CudaRecorder()
        self.seen: Counter[object] = Counter()
        self.recorded: dict[object, tuple[State, Replay]] = {}
        self.logits, self.carried = denoiser.logits, denoiser.carried
        self.block_length: int | None = getattr(denoiser, "block_length", None)

    def hidden(self, state: State) -> Tensor:
        """See `Network.hidden`."""
        # Not recorded: padded sequences, evaluations with a growing cache, and states of training.
        if any(getattr(state, name) is not None for name in _NOT_RECORDED):
            return self.denoiser.hidden(state)
        key = tuple((x.shape, x.dtype) if x is not None else None for x in _tensors(state).values())
        self.seen[key] += 1
        if key not in self.recorded:
            if self.seen[key] <= _WARMUP or len(self.recorded) == _MAX_GRAPHS:
                return self.denoiser.hidden(state)
            copies: dict[str, Any] = {k: x.clone() for k, x in _tensors(state).items() if x is not None}
            own = replace(state, **copies)
            self.recorded[key] = own, self.record(lambda: self.denoiser.hidden(own))
        own, replay = self.recorded[key]
        for name, tensor in _tensors(state).items():
            if tensor is not None:
                getattr(own, name).copy_(tensor)
        return replay().clone()  # the next replay overwrites the result


def _tensors(state: State) -> dict[str, Tensor | None]:
    return {name: getattr(state, name) for name in _TENSORS}


assert {field.name for field in fields(State)} == {*_TENSORS, *_NOT_RECORDED}


class CudaRecorder:
    """Recorder of functions without arguments as CUDA graphs that share one memory pool.

    A result is valid until the next replay of any of them.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # Autocast frees its cached casts of weights when its context ends, but the graph is replayed later.
        with (
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            torch.autocast("cuda", dtype, enabled, cache_enabled=False),
        ):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
