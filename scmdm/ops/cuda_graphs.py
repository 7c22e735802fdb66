"""Evaluations that a GPU replays as one CUDA graph: the host launches one thing instead of hundreds of kernels.

Launching them is what a small batch waits for. A graph has fixed shapes and fixed memory: it is recorded of a shape
that comes again, as in every step of a self-conditioned sampler, and other shapes are evaluated as they are.
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

_BEFORE = 2  # evaluations of a shape before it is recorded: kernels are chosen and compiled in them
_MOST = 8  # graphs: the shapes of a vanilla sampler, which leaves sequences out, are many
_TENSORS = ("z_BL", "t_B", "estimate_BLD", "labels_B")

Replay = Callable[[], Tensor]
Record = Callable[[Callable[[], Tensor]], Replay]


class ReplayedDenoiser:
    """`denoiser`, which must not change, with `hidden` replayed: in one thread, one autocast, without gradients."""

    def __init__(self, denoiser: SamplingDenoiser, record: Record | None = None) -> None:
        self.denoiser, self.record = denoiser, record or CudaRecorder()
        self.seen: Counter[object] = Counter()
        self.recorded: dict[object, tuple[State, Replay]] = {}
        self.logits, self.embed = denoiser.logits, denoiser.embed
        self.expected_embedding = denoiser.expected_embedding

    def hidden(self, state: State) -> Tensor:
        """See `Network.hidden`."""
        assert state.packing is None
        key = tuple((x.shape, x.dtype) if x is not None else None for x in _tensors(state).values())
        self.seen[key] += 1
        if key not in self.recorded:
            if self.seen[key] <= _BEFORE or len(self.recorded) == _MOST:
                return self.denoiser.hidden(state)
            copies: dict[str, Any] = {k: x.clone() for k, x in _tensors(state).items() if x is not None}
            own = replace(state, **copies)
            self.recorded[key] = own, self.record(lambda: self.denoiser.hidden(own))
        own, replay = self.recorded[key]
        for name, tensor in _tensors(state).items():
            if tensor is not None:
                getattr(own, name).copy_(tensor)
        return replay().clone()  # graphs share their memory


def _tensors(state: State) -> dict[str, Tensor | None]:
    return {name: getattr(state, name) for name in _TENSORS}


assert {field.name for field in fields(State)} == {*_TENSORS, "packing"}


class CudaRecorder:
    """Records functions without arguments, whose results lie where the next replay of any of them may write."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # Autocast's copies of weights end with its block, the graph does not: it has to make its own.
        with (
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            torch.autocast("cuda", dtype, enabled, cache_enabled=False),
        ):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
