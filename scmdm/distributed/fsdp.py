"""FSDP2 engine: weights, gradients, optimizer state and EMA are sharded over the ranks.

`fully_shard` gathers a block's weights before it runs and frees them afterwards. Four points differ from common use:

- The loss is already divided by the valid tokens of the global batch, so gradients are summed, not averaged.
- Entry points are methods of the denoiser other than `forward`, registered so that the output head and `p @ E` see
  gathered weights.
- A forward pass without gradients leaves the root's weights gathered. Parameters are therefore read and written through
  the sharded tensors, kept by name from the start, and gathered copies are freed after a write.
- With expert parallelism the stacks of experts are divided twice: over the ranks that share the experts of a layer, and
  by FSDP2 over the ranks that hold the same ones. Files and norms need tensors of all experts (`whole_experts`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
from scmdm.models.experts.expert_block import ExpertMixture, parallel_maps, whole_experts
from scmdm.models.experts.expert_parallel import ExpertGroup
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


class ExpertMesh(NamedTuple):
    """Ranks of a run with expert parallelism."""

    group: ExpertGroup  # ranks that share the experts of each layer
    holders: DeviceMesh  # ranks that hold the same experts: "shard", after "replicate" if there are replicas
    held: DeviceMesh  # all ranks, in the order of what they hold (`whole_experts`)


def make_expert_mesh(config: FsdpConfig, device: torch.device) -> ExpertMesh | None:
    """Make the meshes of expert parallelism, in which each `fsdp.experts` consecutive ranks share the experts.

    Returns None for `fsdp.experts=1`. All ranks call this together.
    """
    if config.experts == 1:
        return None
    shape = config.replicate, dist.get_world_size() // (config.replicate * config.experts), config.experts
    names = "replicate", "shard", "experts"
    first = 0 if config.replicate > 1 else 1
    mesh = init_device_mesh(device.type, shape[first:], mesh_dim_names=names[first:])
    # DTensors are divided by the dimensions of a mesh from left to right: first by experts.
    held = DeviceMesh(
        "cpu" if config.offload else device.type,
        mesh.mesh.transpose(-1, -2).contiguous(),
        mesh_dim_names=("replicate", "experts", "shard")[first:],
    )
    return ExpertMesh(ExpertGroup(mesh.get_group("experts")), mesh[names[first:-1]], held)


def shard(
    model: Network,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    offload: bool = False,
    experts: ExpertMesh | None = None,
) -> None:
    """Shard a model in place: one FSDP group per block, and one for the other parameters, embeddings included.

    Call this before the model has memory. With `experts`, ranks share those of each layer, and each map of them is an
    FSDP group.

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
    if experts is not None:
        for part in _shared_maps(model, experts):
            fully_shard(part, mesh=experts.holders, mp_policy=_policy(dtype), offload_policy=offloading)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=_policy(dtype), offload_policy=offloading)
    rest = _policy(torch.float32 if model.config.head_precision == "float32" else dtype)
    fully_shard(model, mesh=mesh, mp_policy=rest, offload_policy=offloading)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    model.around_blocks = _NestedGroups(model)
    for name in ENTRY_POINTS:
        register_fsdp_forward_method(model, name)


def _shared_maps(model: Network, experts: ExpertMesh) -> list[nn.Module]:
    """Give each rank its experts; returns their maps."""
    mixtures = [module for module in model.modules() if isinstance(module, ExpertMixture)]
    for mixture in mixtures:
        mixture.share_experts(experts.group, experts.held)
    return [part for mixture in mixtures for part in (mixture.gate, mixture.up, mixture.down)]


class _NestedGroups:
    """Gathers the FSDP groups within a block (routers, shared experts) before the block runs, and again backward.

    If they were gathered where they run, within what activation checkpointing runs again, torch would refuse a
    recomputation that gathers what the forward pass did not, with `model.activation_checkpointing=selective`.
    """

    def __init__(self, model: Network) -> None:
        self.free_after_forward = True
        self._nested = [[m for m in block.modules() if isinstance(m, FSDPModule)][1:] for block in model.blocks]
        for group in (group for groups in self._nested for group in groups):
            group.set_reshard_after_forward(False, recurse=False)

    def before(self, number: int) -> None:
        for group in self._nested[number]:
            group.unshard()

    def after(self, number: int, x_BLD: Tensor) -> None:
        if not self._nested[number]:
            return
        for group in self._nested[number] if self.free_after_forward else ():
            group.reshard()
        if x_BLD.requires_grad:
            x_BLD.register_hook(lambda _: self.before(number))


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
        self._experts = parallel_maps(model)
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
        if self._experts:
            return self._clip_by_mesh(limit)
        norm = super().clip_grad_norm(limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _clip_by_mesh(self, limit: float) -> Tensor:
        """Clip as `clip_grad_norm`, which torch does not for experts that are divided otherwise than the rest."""
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        norms = []
        for of_experts in (False, True):
            chosen = {name: grad for name, grad in gradients.items() if (name in self._experts) == of_experts}
            if not chosen:  # torch's norm of nothing is on the CPU
                continue
            norm = torch.nn.utils.get_total_norm(self.pack(chosen).values())
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)
        for parameter in self.trained.values() if limit > 0 else ():
            torch.nn.utils.clip_grads_with_norm_(parameter, limit, norm)
        return norm

    def frozen(self) -> dict[str, Tensor]:
        return self.pack(super().frozen())

    def pack(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same memory; experts that ranks share are described as parts of all experts."""
        return {name: self._whole(name, value) for name, value in values.items()}

    def _whole(self, name: str, value: Tensor) -> Tensor:
        if name not in self._experts:
            return value
        module, mesh = self._experts[name]
        return whole_experts(value, mesh, module.experts)

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
            block.set_reshard_after_forward(after_forward, recurse=False)
        assert isinstance(self._model.around_blocks, _NestedGroups)
        self._model.around_blocks.free_after_forward = after_forward


class _FrozenDenoiser(_TwoPassDenoiser):
    """A sharded model without a backward pass, after whose estimate all gathered weights are freed."""

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        try:
            return super().estimate(state, dropout=dropout)
        finally:
            assert isinstance(self._model, FSDPModule)
            self._model.reshard()
