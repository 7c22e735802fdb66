"""Host buffers into which tensors are copied before a save, so that training may continue while it is written.

The buffers are allocated at the first save and reused. On a GPU they are page-locked and filled on a stream of their
own: the host does not wait, and kernels that follow wait for the copies alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.models.tensor_files import local_part


@dataclass(frozen=True)
class Staged:
    """This rank's part of each tensor in host memory, complete once `wait` has returned."""

    values: dict[str, Tensor]
    wait: Callable[[], None]


class HostBuffers:
    """Buffers of one writer. A staged copy is valid until the next one is made."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def stage(self, tensors: Mapping[str, Tensor]) -> Staged:
        """Copy this rank's part of each tensor; operations that follow on the current stream may change the tensors."""
        parts = {name: local_part(tensor).detach() for name, tensor in tensors.items()}
        values = {name: self._buffer(name, part) for name, part in parts.items()}
        for name, part in parts.items():
            if not part.is_cuda:
                values[name].copy_(part)
        on_gpu = {name: part for name, part in parts.items() if part.is_cuda}
        return Staged(values, self._copy_from_gpu(on_gpu, values) if on_gpu else lambda: None)

    def _buffer(self, name: str, part: Tensor) -> Tensor:
        found = self._buffers.get(name)
        if found is None or found.shape != part.shape or found.dtype != part.dtype:
            found = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._buffers[name] = found
        return found

    def _copy_from_gpu(self, parts: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Callable[[], None]:
        device = next(iter(parts.values())).device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for name, part in parts.items():
                values[name].copy_(part, non_blocking=True)
                part.record_stream(self._stream)  # memory of a converted tensor must not be reused before the copy
            done = torch.cuda.Event()
            done.record(self._stream)
        current.wait_stream(self._stream)
        return done.synchronize
