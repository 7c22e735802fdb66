"""FSDP2: weights, gradients, optimizer and averages sharded over the ranks, with the two passes of an adaptation step.

`fully_shard` gathers a block's weights before it runs and frees them behind it. Three things are particular here:

- the loss is already divided by the valid tokens of the global batch, so gradients are summed, never averaged;
- the entry points are methods of the denoiser, not `forward`, so that the head and `p @ E` see gathered weights;
- a forward pass without gradients leaves the root's weights gathered: whoever reads or writes parameters uses the
  sharded ones, kept by name from the start, and drops the gathered copies after a write.
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
from scmdm.models.network import Network

ENTRY_POINTS = ("estimate", "weighted_nll")


def make_mesh(config: FsdpConfig, device: torch.device) -> DeviceMesh:
    """Ranks that share one copy of the weights; with `fsdp.replicate` > 1 (HSDP) several such groups."""
    size = dist.get_world_size()
    if config.replicate == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    shape = (config.replicate, size // config.replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Network, mesh: DeviceMesh, dtype: torch.dtype, *, offload: bool = False) -> None:
    """Shard a model in place: one group per block, one for all the rest (both embeddings, so that `p @ E` finds them).

    Weights travel in `dtype` (those of the rest in float32 for `head_precision=float32`), gradients are summed in
    float32. Inputs are not cast: the residual stream and the times keep their precision, as under the single engine.
    `offload` keeps the shards, gradients and what the optimizer makes of them in host memory.
    """
    where = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=_policy(dtype), offload_policy=where)
    rest = _policy(torch.float32 if model.config.head_precision == "float32" else dtype)
    fully_shard(model, mesh=mesh, mp_policy=rest, offload_policy=where)
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
    """One rank of a sharded model."""

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
        if (context := make_context(config.context, device)) is not None:
            model.slice_sequences(context)
            self.denoiser = SlicedDenoiser(self.denoiser, context)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.sharded.set_requires_gradient_sync(last)
        loss.backward()

    def clip_grad_norm(self, limit: float) -> Tensor:
        norm = super().clip_grad_norm(limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def load_parameters(self, parameters: dict[str, Tensor]) -> None:
        super().load_parameters(parameters)
        self.sharded.reshard()


class _TwoPassDenoiser:
    """The model, with the setting of what happens to gathered weights between the two passes.

    Kept (the default), blocks are gathered once for both forward passes; dropped, they are gathered again, and the
    no-grad pass needs no more memory than one block.
    """

    def __init__(self, model: Network, reshard_after_estimate: bool) -> None:
        self._model, self._reshard = model, reshard_after_estimate

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        self._free_blocks(self._reshard)
        try:
            return self._model.estimate(state, dropout=dropout)
        finally:
            self._free_blocks(True)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        return self._model.weighted_nll(state, x_BL, weight_BL)

    def _free_blocks(self, after_forward: bool) -> None:
        """Of the blocks alone: the rest is needed again at once, and stays gathered until the backward pass is done."""
        for block in self._model.blocks:
            assert isinstance(block, FSDPModule)
            block.set_reshard_after_forward(after_forward)
