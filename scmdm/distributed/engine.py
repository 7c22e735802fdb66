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
import torch.distributed as dist
from torch import Tensor

from scmdm.config.run import RunConfig
from scmdm.diffusion.objective import Denoiser
from scmdm.errors import UserError
from scmdm.models.attention import check_backend
from scmdm.models.network import Network

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per parameter, besides the number of updates


class Engine(Protocol):
    """One rank's view of a training step."""

    rank: int
    world_size: int
    data_rank: int  # which part of a batch this rank has; several ranks have the same one under context parallelism
    data_size: int  # how many parts there are
    device: torch.device
    model: Network
    optimizer: torch.optim.Optimizer
    denoiser: Denoiser  # what the objective calls

    def all_gather(self, values: Tensor) -> Tensor:
        """Concatenate a 1-D tensor over the parts of the batch, in their order."""
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

    def clip_grad_norm(self, limit: float) -> Tensor:
        """The gradient's norm over all ranks (scalar), after scaling gradients down to `limit` (0: only measure)."""
        ...

    def step(self, skip: Tensor) -> None:
        """Update the parameters, unless `skip` (scalar, bool) is true, and clear the gradients. The host need not
        know: it goes on while the device is still in the backward pass."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """This rank's part of the parameters that are trained, by name, for EMA and checkpoints."""
        ...

    def frozen(self) -> dict[str, Tensor]:
        """This rank's part of those that are not, for checkpoints: of the parameters' shapes, whole or DTensor."""
        ...

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        """Overwrite this rank's part of the trained parameters in place."""
        ...

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's running means by kind and parameter, zero before the first step: for checkpoints."""
        ...

    def set_optimizer_step(self, step: int) -> None:
        """Tell the optimizer how many updates it has made, after its moments were loaded."""
        ...

    def pack(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint keeps of `parameters`, their averages or moments: tensors of the parameters' shapes, whole
        or DTensor. All ranks call this together."""
        ...

    def unpack(self, packed: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """Bring `values` up to date with the result of `pack`, after a checkpoint was read into that."""
        ...


class SingleEngine:
    """One process, one device."""

    rank, world_size, data_rank, data_size = 0, 1, 0, 1

    def __init__(
        self, model: Network, optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.optimizer, self.device, self.dtype = model, optimizer, device, dtype
        self.denoiser: Denoiser = model
        own = dict(model.named_parameters())
        self.trained = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        self._frozen = {name: parameter for name, parameter in own.items() if not parameter.requires_grad}

    def all_gather(self, values: Tensor) -> Tensor:
        return values

    def sum(self, value: Tensor) -> Tensor:
        return value

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        return compute_context(self.device, self.dtype)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def clip_grad_norm(self, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.trained.values(), limit if limit > 0 else float("inf"))

    def step(self, skip: Tensor) -> None:
        # What torch's gradient scaler tells a fused optimizer. To the device of offloaded weights the optimizer itself
        # would copy it without waiting for the copy.
        device = next(iter(self.trained.values())).device
        self.optimizer.found_inf = skip.float().to(device)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def frozen(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._frozen.items()}

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        own = self.parameters()
        assert own.keys() == parameters.keys()
        for name, value in parameters.items():
            own[name].copy_(value)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        for parameter in self.trained.values():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state.update({kind: torch.zeros_like(parameter) for kind in MOMENTS})
        states = {name: self.optimizer.state[parameter] for name, parameter in self.trained.items()}
        return {kind: {name: state[kind] for name, state in states.items()} for kind in MOMENTS}

    def set_optimizer_step(self, step: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def pack(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values

    def unpack(self, packed: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """Nothing: they are the same tensors."""


class ParallelEngine(SingleEngine):
    """What engines of several processes have in common."""

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype,
        context: int = 1,
    ) -> None:
        super().__init__(model, optimizer, device, dtype)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_rank, self.data_size = self.rank // context, self.world_size // context

    def all_gather(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values)
        return torch.cat(parts[:: self.world_size // self.data_size])

    def sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total


def compute_context(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype`, or nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" takes a GPU where there is one. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here; use device=cpu, or see `scmdm doctor`")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs; start one process per GPU"
        )
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


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


def check_hardware(config: RunConfig, local_rank: int = 0) -> tuple[torch.device, torch.dtype]:
    """The device and compute dtype of a run; raises UserError when the configuration asks for what is not here."""
    device = resolve_device(config.device, local_rank)
    dtype = resolve_precision(config.precision, device)
    check_backend(config.model.attention, device.type, dtype)
    if config.model.compile and device.type == "cpu" and not cpp_compiler():
        raise UserError("model.compile=true needs a C++ compiler on a CPU, and there is none; install g++ or set CXX")
    return device, dtype


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))
