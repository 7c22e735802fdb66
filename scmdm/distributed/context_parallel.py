"""Context parallelism: each sequence is cut into slices of equal length, one per rank of a group.

All but attention works position by position, on the slice alone. Attention sees whole sequences of some of the heads
(`scmdm.models.attention.attend_slices`). A group's ranks read the same samples and draw the same noise for them, keyed
on the sample; what each then keeps of it is cut out here, so that neither objective nor step knows of slices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.state import State
from scmdm.errors import UserError


def make_context(ranks: int, device: torch.device) -> DeviceMesh | None:
    """This rank's group of `ranks` consecutive ones, None for one alone. All ranks call this together."""
    if ranks == 1:
        return None
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))["context"]


class SlicedDenoiser:
    """Takes whole sequences and runs the network on this rank's slice; estimates stay slices, NLLs come back whole."""

    def __init__(self, denoiser: Denoiser, context: DeviceMesh) -> None:
        self._denoiser, self._context = denoiser, context

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        return self._denoiser.estimate(self._sliced(state), dropout=dropout)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The sum is this slice's part of the loss: like the ranks' parts of a batch, they are added up later."""
        total, nll_BL = self._denoiser.weighted_nll(self._sliced(state), self._slice(x_BL), self._slice(weight_BL))
        return total, DTensor.from_local(nll_BL, self._context, (Shard(1),), run_check=False).full_tensor()

    def _sliced(self, state: State) -> State:
        """Its estimate is a slice already."""
        if state.packing is not None:
            raise UserError(
                "fsdp.context cuts sequences, which packed samples (framing=packed) do not allow; set it to 1"
            )
        return replace(state, z_BL=self._slice(state.z_BL))

    def _slice(self, x_BL: Tensor) -> Tensor:
        return x_BL.chunk(self._context.size(), dim=1)[self._context.get_local_rank()]
