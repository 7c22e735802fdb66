"""Context parallelism: each rank of a group computes an equal slice of every sequence.

Everything except attention works on single positions, hence on the slice alone. Attention gets whole sequences of some
of the heads (`scmdm.models.attention.attend_slices`). The ranks of a group read the same samples and draw the same
noise, keyed on the sample. Sequences are sliced here, so that objective and training step work on whole sequences.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.state import State
from scmdm.errors import UserError


def make_context(ranks: int, device: torch.device) -> DeviceMesh | None:
    """Make the mesh of this rank's group of consecutive `ranks`; None for one rank. All ranks call this together."""
    if ranks == 1:
        return None
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))["context"]


class SlicedDenoiser:
    """Denoiser that takes whole sequences and computes this rank's slice.

    Estimates and residual streams are returned as slices (B, L / ranks, D), NLLs as whole sequences (B, L).
    """

    def __init__(self, denoiser: Denoiser, context: DeviceMesh) -> None:
        self._denoiser, self._context = denoiser, context

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        return self._denoiser.lower(self._sliced(state), dropout=dropout)

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        return self._denoiser.estimate(self._sliced(state), dropout=dropout)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return this slice's part of the loss, to be summed over the ranks, and the NLL of whole sequences (B, L)."""
        total, nll_BL = self._denoiser.weighted_nll(self._sliced(state), self._slice(x_BL), self._slice(weight_BL))
        return total, DTensor.from_local(nll_BL, self._context, (Shard(1),), run_check=False).full_tensor()

    def _sliced(self, state: State) -> State:
        """Return the state with its sequences sliced; estimate and residual stream are slices already."""
        size = self._context.size()
        if state.clean_BL is not None:
            raise UserError(f"fsdp.context={size} is not possible with diffusion.block_length; set it to 1")
        if state.packing is not None:
            raise UserError(f"fsdp.context={size} is not possible with packed samples (framing=packed); set it to 1")
        names = ("z_BL", "next_BL", "perturbation_BLD")
        whole = {name: getattr(state, name) for name in names}
        slices: dict[str, Any] = {name: self._slice(x) for name, x in whole.items() if x is not None}
        return replace(state, **slices)

    def _slice(self, x_BL: Tensor) -> Tensor:
        return x_BL.chunk(self._context.size(), dim=1)[self._context.get_local_rank()]
