"""Context parallelism: each sequence is cut into slices of equal length, one per rank of a group.

All but attention works position by position, on the slice alone. Attention sees whole sequences of some of the heads
(`scmdm.model.attention.attend_slices`). A group's ranks read the same samples and draw the same noise for them, keyed
on the sample; what each then keeps of it is cut out here, so that neither objective nor step knows of slices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.sequences import SideInputs
from scmdm.errors import UserError


def make_context(ranks: int, device: torch.device) -> DeviceMesh | None:
    """This rank's group of `ranks` consecutive ones, None for one alone. All ranks call this together."""
    if ranks == 1:
        return None
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))["context"]


def _given(side: SideInputs | None) -> dict[str, Any]:
    if side is not None and side.packing is not None:
        raise UserError("fsdp.context cuts sequences, which packed samples (framing=packed) do not allow; set it to 1")
    return {} if side is None else {"side": side}


class SlicedDenoiser:
    """Takes whole sequences and runs the network on this rank's slice; estimates stay slices, NLLs come back whole."""

    def __init__(self, denoiser: Denoiser, context: DeviceMesh) -> None:
        self._denoiser, self._context = denoiser, context

    def estimate(
        self,
        z_BL: Tensor,
        t_B: Tensor,
        estimate_BLD: Tensor | None,
        *,
        dropout: bool = False,
        side: SideInputs | None = None,
    ) -> Tensor:
        return self._denoiser.estimate(self._slice(z_BL), t_B, estimate_BLD, dropout=dropout, **_given(side))

    def weighted_nll(
        self,
        z_BL: Tensor,
        t_B: Tensor,
        estimate_BLD: Tensor | None,
        x_BL: Tensor,
        weight_BL: Tensor,
        *,
        side: SideInputs | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum is this slice's part of the loss: like the ranks' parts of a batch, they are added up later."""
        z_BL, x_BL, weight_BL = self._slice(z_BL), self._slice(x_BL), self._slice(weight_BL)
        total, nll_BL = self._denoiser.weighted_nll(z_BL, t_B, estimate_BLD, x_BL, weight_BL, **_given(side))
        return total, DTensor.from_local(nll_BL, self._context, (Shard(1),), run_check=False).full_tensor()

    def _slice(self, x_BL: Tensor) -> Tensor:
        return x_BL.chunk(self._context.size(), dim=1)[self._context.get_local_rank()]
