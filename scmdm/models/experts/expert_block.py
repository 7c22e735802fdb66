"""Mixture of experts in place of the gated MLP of a decoder's block: routed experts, and experts that all tokens share.

The weights of all experts are stacked, so that one product serves them. Each token is copied once per expert that it
goes to, the copies are sorted by expert, and the results are summed with the router's weights in the token's order: no
token is dropped, memory is proportional to tokens times experts per token, and nothing depends on the order in which a
device adds. An expert without tokens has zero gradients.

With expert parallelism (`scmdm.models.experts.expert_parallel`) a rank holds a share of the stack, and copies go to the
ranks that hold their experts.

Legend: B sequences, L length, N tokens, D width, E experts, T experts per token, P rows (copies of tokens, with those
that align groups), Q rows that this rank receives, O width of a map's output, I of its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from scmdm.models.experts.expert_parallel import ExpertExchange, ExpertGroup
from scmdm.models.experts.router import Router
from scmdm.models.linear import Linear
from scmdm.ops.grouped_product import compute_dtype, group_alignment, grouped_product


class ExpertLinear(nn.Module):
    """A linear map per expert, without bias."""

    def __init__(self, experts: int, width: int, out: int) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, width, out
        self.weight = nn.Parameter(torch.empty(experts, out, width))
        self.mesh: DeviceMesh | None = None  # of the ranks, if they share the experts

    def hold_share(self, ranks: int, mesh: DeviceMesh | None) -> None:
        """Hold the experts of one of `ranks` ranks, before the weight has memory. `mesh` is as in `whole_experts`."""
        assert self.weight.is_meta
        share = self.weight.new_empty(self.experts // ranks, *self.weight.shape[1:])
        self.weight, self.mesh = nn.Parameter(share, self.weight.requires_grad), mesh

    def forward(self, x_PI: Tensor, ends_E: Tensor) -> Tensor:
        """Map rows (P, I), sorted by expert, to (P, O); expert e's end at row `ends_E[e]`."""
        return grouped_product(x_PI, self.weight, ends_E)


def whole_experts(held: Tensor, mesh: DeviceMesh, experts: int) -> DTensor:
    """Describe a rank's part of a stack, sharded by FSDP2 or not, as a DTensor of all experts with the same memory.

    `mesh` has the dimensions "experts" and "shard", and "replicate" before them if there are replicas.
    """
    local = held.to_local() if isinstance(held, DTensor) else held
    shape = torch.Size((experts, *held.shape[1:]))
    placements = [Replicate() if name == "replicate" else Shard(0) for name in mesh.mesh_dim_names or ()]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.detach(), mesh, placements, run_check=False, shape=shape, stride=stride)


def parallel_maps(model: nn.Module) -> dict[str, tuple[ExpertLinear, DeviceMesh]]:
    """Return the maps whose experts ranks share, by the name of their weight."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}
    return {f"{name}.weight": (module, module.mesh) for name, module in found.items() if module.mesh is not None}


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model, detached, with the shapes that they have in files."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, (module, mesh) in parallel_maps(model).items():
        found[name] = whole_experts(found[name], mesh, module.experts)
    return found


@dataclass(frozen=True)
class Order:
    """Rows sorted by expert."""

    row_NT: Tensor  # int64; the row of each copy of a token
    token_P: Tensor  # int64; the token of each row
    ends_E: Tensor  # int32; the row at which each expert's end
    counts_E: Tensor  # int64; rows of each expert, without those that align groups


def sort_by_expert(experts_NT: Tensor, experts: int, alignment: int) -> Order:
    """Sort the copies of tokens by expert, each expert's by token.

    Each expert gets a multiple of `alignment` rows. The number of rows depends on shapes alone, so that the host does
    not wait for the device: there are rows after the last expert, which are copies of token 0 without effect.
    """
    chosen = experts_NT.flatten()
    order = chosen.argsort(stable=True)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=chosen.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )
    rows_E = (counts_E + alignment - 1) // alignment * alignment
    ends_E = rows_E.cumsum(0)
    shift_E = (ends_E - rows_E) - (counts_E.cumsum(0) - counts_E)
    row = torch.empty_like(chosen)
    row[order] = torch.arange(len(chosen), device=chosen.device) + shift_E[chosen[order]]
    total = len(chosen) + (experts * (alignment - 1) if alignment > 1 else 0)
    token_P = torch.zeros(total, dtype=torch.int64, device=chosen.device)
    token_P[row] = torch.arange(len(chosen), device=chosen.device) // experts_NT.shape[1]
    return Order(row.view_as(experts_NT), token_P, ends_E.to(torch.int32), counts_E)


class _CopyRows(torch.autograd.Function):
    """Copy each token to its rows in a dtype; the backward pass sums in the token's order, without atomic additions."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_P: Tensor, row_NT: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(row_NT)
        ctx.dtype = x_ND.dtype
        return x_ND.to(dtype).index_select(0, token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_PD: Tensor) -> tuple[Tensor, None, None, None]:
        (row_NT,) = ctx.saved_tensors
        d_NTD = d_PD.index_select(0, row_NT.flatten()).unflatten(0, row_NT.shape)
        return d_NTD.sum(1, dtype=ctx.dtype), None, None, None


class ExpertMixture(nn.Module):
    """Routed gated MLPs, and optionally one that all tokens share, without biases."""

    def __init__(self, router: Router, *, width: int, expert_width: int, shared_width: int) -> None:
        super().__init__()
        experts = len(router.weight)
        self.router = router
        self.gate = ExpertLinear(experts, width, expert_width)
        self.up = ExpertLinear(experts, width, expert_width)
        self.down = ExpertLinear(experts, expert_width, width)
        self.shared_gate = Linear(width, shared_width, bias=False) if shared_width else None
        self.shared_up = Linear(width, shared_width, bias=False) if shared_width else None
        self.shared_down = Linear(shared_width, width, bias=False) if shared_width else None

        self.group: ExpertGroup | None = None

    def share_experts(self, group: ExpertGroup, mesh: DeviceMesh | None) -> None:
        """Keep only this rank's share of the experts; call this before weights are allocated."""
        self.group = group
        for module in self.modules():
            if isinstance(module, ExpertLinear):
                module.hold_share(group.ranks, mesh)

    def leave_out_of_graphs(self) -> None:
        """Run uncompiled within a compiled block: the number of tokens of an expert differs from batch to batch."""
        self.forward = torch.compiler.disable(self.forward)  # type: ignore[method-assign]

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map the normalised residual stream to what the mixture adds to it."""
        experts_NT, weights_NT = self.router(x_BLD)
        y_BLD = self._routed(x_BLD.flatten(0, 1), experts_NT, weights_NT).view_as(x_BLD)
        if self.shared_gate is None or self.shared_up is None or self.shared_down is None:
            return y_BLD
        return y_BLD + self.shared_down(F.silu(self.shared_gate(x_BLD)) * self.shared_up(x_BLD))

    def _routed(self, x_ND: Tensor, experts_NT: Tensor, weights_NT: Tensor) -> Tensor:
        experts = self.gate.experts
        if self.group is None:
            order = sort_by_expert(experts_NT, experts, group_alignment(x_ND))
            y_PD = self._map(_copy_rows(x_ND, order, x_ND.dtype), order.ends_E)
        else:
            order = sort_by_expert(experts_NT, experts, 1)
            # Sent in the dtype of the products.
            y_PD = self._map_elsewhere(_copy_rows(x_ND, order, compute_dtype(x_ND)), order.counts_E, self.group)
        y_NTD = y_PD.index_select(0, order.row_NT.flatten()).unflatten(0, experts_NT.shape)
        return (weights_NT[..., None].to(y_NTD.dtype) * y_NTD).sum(1)

    def _map(self, x_PD: Tensor, ends_E: Tensor) -> Tensor:
        """Apply the experts that this rank holds to rows, sorted by expert."""
        h_PI = F.silu(self.gate(x_PD, ends_E)) * self.up(x_PD, ends_E)
        return self.down(h_PI, ends_E)

    def _map_elsewhere(self, x_PD: Tensor, counts_E: Tensor, group: ExpertGroup) -> Tensor:
        """Apply experts to rows, sorted by expert, on the ranks that hold them."""
        exchange = ExpertExchange(group, counts_E, len(x_PD))
        x_QD = exchange.send(x_PD)
        held = sort_by_expert(exchange.expert_Q[:, None], self.gate.experts // group.ranks, group_alignment(x_QD))
        y_QD = self._map(_copy_rows(x_QD, held, x_QD.dtype), held.ends_E)
        return exchange.send_back(y_QD.index_select(0, held.row_NT.flatten()))


def _copy_rows(x_ND: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
    copies: Tensor = _CopyRows.apply(x_ND, order.token_P, order.row_NT, dtype)
    return copies
