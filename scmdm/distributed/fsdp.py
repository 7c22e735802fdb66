"""FSDP2 engine: weights, gradients, optimizer state and EMA are sharded over the ranks.

`fully_shard` gathers a block's weights before it runs and frees them afterwards. Three points differ from common use:

- The loss is already divided by the valid tokens of the global batch, so gradients are summed, not averaged.
- Entry points are methods of the denoiser other than `forward`, registered so that the output head and `p @ E` see
  gathered weights.
- A forward pass without gradients leaves the root's weights gathered. Parameters are therefore read and written through
  the sharded tensors, kept by name from the start, and gathered copies are freed after a write.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from scmdm.config.distributed import FsdpConfig
from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.state import State
from scmdm.distributed.context_parallel import SlicedDenoiser, make_context
from scmdm.distributed.engine import ParallelEngine
from scmdm.models.experts.router import routers_of
from scmdm.models.network import Network

ENTRY_POINTS = ("lower", "estimate", "weighted_nll")


def make_mesh(config: FsdpConfig, device: torch.device) -> DeviceMesh:
    """Make the device mesh of the ranks: one group that shards the weights, or `fsdp.replicate` such groups (HSDP)."""
    size = dist.get_world_size()
    if config.replicate == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    shape = (config.replicate, size // config.replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Network, mesh: DeviceMesh, dtype: torch.dtype, *, offload: bool = False) -> None:
    """Shard a model in place: one FSDP group per block, and one for the other parameters, embeddings included.

    Weights are gathered in `dtype`, those outside of blocks in float32 for `head_precision=float32`. Gradients are
    summed in float32. Inputs are not cast, so that the residual stream and the times keep their precision, as with the
    single engine. `offload` keeps shards, gradients and optimizer state in host memory.
    """
    offloading = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for router in routers_of(model):
        # Its weight is gathered in float32, in which it computes. The bias has no gradient: each rank holds all of it.
        whole = set() if router.balance is None else set(router.balance.parameters())
        policy = _policy(torch.float32)
        fully_shard(router, mesh=mesh, mp_policy=policy, offload_policy=offloading, ignored_params=whole)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=_policy(dtype), offload_policy=offloading)
    rest = _policy(torch.float32 if model.config.head_precision == "float32" else dtype)
    fully_shard(model, mesh=mesh, mp_policy=rest, offload_policy=offloading)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    for name in ENTRY_POINTS:
        register_fsdp_forward_method(model, name)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    weights = None if dtype == torch.float32 else dtype
    return MixedPrecisionPolicy(param_dtype=weights, reduce_dtype=torch.float32, cast_forward_inputs=False)


class FsdpEngine(ParallelEngine):
    """Engine for a model that `shard` has sharded."""

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        dtype: torch.dtype,
        config: FsdpConfig,
    ) -> None:
        super().__init__(model, optimizer, device, dtype, config.context)
        assert isinstance(model, FSDPModule)
        self.sharded: FSDPModule = model
        self.denoiser: Denoiser = _TwoPassDenoiser(model, config.reshard_after_estimate)
        self._context = make_context(config.context, device)
        if self._context is not None:
            model.slice_sequences(self._context)
            self.denoiser = SlicedDenoiser(self.denoiser, self._context)

    def add_base(self, base: Network | None) -> None:
        if base is None:
            super().add_base(None)
            return
        frozen = _FrozenDenoiser(base, reshard_after_estimate=True)
        self.base = frozen
        if self._context is not None:
            base.slice_sequences(self._context)
            self.base = SlicedDenoiser(frozen, self._context)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.sharded.set_requires_gradient_sync(last)
        loss.backward()

    def clip_grad_norm(self, limit: float, skip: Tensor | None = None) -> Tensor:
        norm = super().clip_grad_norm(limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        super().load_parameters(parameters)
        self.sharded.reshard()


class _TwoPassDenoiser:
    """The model, which keeps or frees gathered weights between the two passes of an adaptation step.

    By default blocks stay gathered, and are gathered once for both forward passes. With `reshard_after_estimate` they
    are freed and gathered again, so that the pass without gradients holds one gathered block at a time.
    """

    def __init__(self, model: Network, reshard_after_estimate: bool) -> None:
        self._model, self._reshard = model, reshard_after_estimate

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        if not self._model.inject_layer:  # a call would gather weights
            return None
        return self._model.lower(state, dropout=dropout)

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        self._free_blocks(self._reshard)
        try:
            return self._model.estimate(state, dropout=dropout)
        finally:
            self._free_blocks(True)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.weighted_nll(state, x_BL, weight_BL)

    def _free_blocks(self, after_forward: bool) -> None:
        """Set whether blocks are freed after a forward pass. The root group stays gathered until the backward pass."""
        for block in self._model.blocks:
            assert isinstance(block, FSDPModule)
            block.set_reshard_after_forward(after_forward)


class _FrozenDenoiser(_TwoPassDenoiser):
    """A sharded model without a backward pass, after whose estimate all gathered weights are freed."""

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        try:
            return super().estimate(state, dropout=dropout)
        finally:
            assert isinstance(self._model, FSDPModule)
            self._model.reshard()
