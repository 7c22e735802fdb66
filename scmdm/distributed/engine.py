"""Engines: the parts of a training step that depend on the device and the number of processes.

The trainer uses only the interface `Engine`, so that it is the same for one process and for sharded models.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scmdm.config.run import RunConfig
from scmdm.diffusion.objective import Denoiser
from scmdm.distributed.base_estimate import Estimator, WithoutAdapters
from scmdm.errors import UserError
from scmdm.models.attention import check_backend
from scmdm.models.compilation import check_compiler
from scmdm.models.network import Network
from scmdm.ops.fp8 import fp8_unusable_because

# Later versions of torch warn of the former name; torch 2.11 has it alone.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state per parameter, besides the number of updates


class Engine(Protocol):
    """Interface of an engine, on one rank."""

    rank: int
    world_size: int
    data_rank: int  # index of this rank's part of a batch; the ranks of a context-parallel group share one
    data_size: int  # number of parts of a batch
    device: torch.device
    model: Network
    optimizer: torch.optim.Optimizer
    denoiser: Denoiser  # the model as the objective calls it
    base: Estimator | None  # frozen base, which makes the estimates of training; None: the model does

    def add_base(self, base: Network | None) -> None:
        """Let a frozen base make the estimates of training: a copy of it, or None for the model without adapters.

        A copy is sharded as the model is.
        """
        ...

    def all_gather(self, values: Tensor, *, all_ranks: bool = False) -> Tensor:
        """Concatenate a 1-D tensor over the parts of the batch in order, or over all ranks."""
        ...

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, perhaps in its memory."""
        ...

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager that sets the precision of forward passes."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients. `last` marks the last micro-batch of an optimizer step."""
        ...

    def clip_grad_norm(self, limit: float, skip: Tensor | None = None) -> Tensor:
        """Scale gradients down to norm `limit` (0: do not scale), and return their norm before that, over all ranks.

        An engine whose update is part of this call does not update if `skip`, a bool scalar, is true.
        """
        ...

    def step(self, skip: Tensor) -> None:
        """Update the parameters unless `skip`, a bool scalar on the device, is true; then clear the gradients.

        The host does not read `skip`, so that it can run ahead of the device.
        """
        ...

    def parameters(self) -> dict[str, Tensor]:
        """Return this rank's part of the trained parameters, by name, for EMA and checkpoints."""
        ...

    def frozen(self) -> dict[str, Tensor]:
        """Return this rank's part of the frozen parameters, by name, for checkpoints: whole tensors or DTensors."""
        ...

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        """Overwrite this rank's part of the trained parameters in place."""
        ...

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's moments by kind and parameter, for checkpoints; zero before the first step."""
        ...

    def set_optimizer_step(self, step: int) -> None:
        """Set the optimizer's number of updates, after its moments were loaded."""
        ...

    def pack(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert parameters, averages or moments from the engine's layout to that of checkpoints.

        The results have the parameters' shapes, as whole tensors or DTensors. All ranks call this together.
        """
        ...

    def unpack(self, packed: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """Copy `packed`, a result of `pack` into which a checkpoint was read, back to `values`."""
        ...


class SingleEngine:
    """Engine for one process with one device."""

    rank, world_size, data_rank, data_size = 0, 1, 0, 1

    def __init__(
        self, model: Network, optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model, self.optimizer, self.device, self.dtype = model, optimizer, device, dtype
        self.denoiser: Denoiser = model
        self.base: Estimator | None = None
        own = dict(model.named_parameters())
        self.trained = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
        self._frozen = {name: parameter for name, parameter in own.items() if not parameter.requires_grad}

    def add_base(self, base: Network | None) -> None:
        self.base = WithoutAdapters(self.denoiser, self.model) if base is None else base

    def all_gather(self, values: Tensor, *, all_ranks: bool = False) -> Tensor:
        return values

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        return compute_context(self.device, self.dtype)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def clip_grad_norm(self, limit: float, skip: Tensor | None = None) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.trained.values(), limit if limit > 0 else float("inf"))

    def step(self, skip: Tensor) -> None:
        # A fused optimizer skips the update if this attribute, which torch's GradScaler sets, is 1. It is copied to the
        # device of the weights here, because for offloaded weights the optimizer does not wait for its own copy.
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
        """Do nothing: `pack` returns the same tensors."""


class ParallelEngine(SingleEngine):
    """Base class of engines for several processes."""

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

    def all_gather(self, values: Tensor, *, all_ranks: bool = False) -> Tensor:
        found = values.new_empty(self.world_size * len(values))
        _all_gather_single(found, values)
        if all_ranks:
            return found
        return found.view(self.world_size, -1)[:: self.world_size // self.data_size].flatten()

    def all_reduce(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values


def compute_context(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context that casts to `dtype`; a null context for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for `name`; "auto" is a GPU if there is one. Raises UserError if the device does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device; use device=cpu, or see `scmdm doctor`")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs; start one process per GPU"
        )
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for `name`; "auto" is bfloat16 if the hardware multiplies it natively, else float32."""
    if name == "auto":
        return torch.bfloat16 if _native_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def check_hardware(config: RunConfig, local_rank: int = 0) -> tuple[torch.device, torch.dtype]:
    """Return device and compute dtype of a run. Raises UserError if the machine lacks what it requires."""
    device = resolve_device(config.device, local_rank)
    dtype = resolve_precision(config.precision, device)
    check_backend(config.model.attention, device.type, dtype)
    check_compiler("model.compile", config.model.compile, device)
    if config.model.matmul_precision == "fp8" and (reason := fp8_unusable_because(device, dtype)) is not None:
        raise UserError(f"model.matmul_precision=fp8 cannot run: {reason}; use matmul_precision=compute")
    return device, dtype
