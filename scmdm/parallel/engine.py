"""The engine: everything in a training step that depends on where and over how many processes it runs.

The trainer knows only this interface, so an engine that shards can take the place of `SingleEngine` without a change to
the loop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any, Protocol

import torch
from torch import Tensor

from scmdm.config.schema import RunConfig
from scmdm.errors import UserError
from scmdm.model.attention import check_backend
from scmdm.model.dit import DiT


class Engine(Protocol):
    """One rank's view of a training step."""

    rank: int
    world_size: int
    device: torch.device
    model: DiT
    optimizer: torch.optim.Optimizer

    def all_gather(self, values: Tensor) -> Tensor:
        """Concatenate a 1-D tensor over the ranks, in rank order."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks."""
        ...

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which forward passes run (precision)."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; `last` marks the last micro-batch of the optimizer step."""
        ...

    def clip_grad_norm(self, limit: float) -> float:
        """The gradient's norm over all ranks, after scaling gradients down to `limit` (0: only measure)."""
        ...

    def step(self) -> None:
        """Update the parameters and clear the gradients."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """This rank's parameters by name, for EMA and checkpoints."""
        ...

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        """Overwrite this rank's parameters in place."""
        ...


class SingleEngine:
    """One process, one device."""

    rank, world_size = 0, 1

    def __init__(self, model: DiT, optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.optimizer, self.device, self.dtype = model, optimizer, device, dtype

    def all_gather(self, values: Tensor) -> Tensor:
        return values

    def sum(self, value: Tensor) -> Tensor:
        return value

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        return compute_context(self.device, self.dtype)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def clip_grad_norm(self, limit: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit if limit > 0 else float("inf")))

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        own = self.parameters()
        assert own.keys() == parameters.keys()
        for name, value in parameters.items():
            own[name].copy_(value)


def compute_context(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype`, or nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def resolve_device(name: str) -> torch.device:
    """ "auto" takes a GPU where there is one. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here; use device=cpu, or see `scmdm doctor`")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" takes bfloat16 where the hardware multiplies it natively, else float32."""
    if name == "auto":
        return torch.bfloat16 if _native_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_hardware(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype of a run; raises UserError when the configuration asks for what is not here."""
    device = resolve_device(config.device)
    dtype = resolve_precision(config.precision, device)
    check_backend(config.model.attention, device.type, dtype)
    if config.model.compile and device.type == "cpu" and not cpp_compiler():
        raise UserError("model.compile=true needs a C++ compiler on a CPU, and there is none; install g++ or set CXX")
    return device, dtype


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))
