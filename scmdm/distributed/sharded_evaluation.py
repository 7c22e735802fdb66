"""Evaluation without gradients of a model whose weights the ranks of a group share (FSDP2).

A block's weights are gathered before it runs and freed afterwards; those outside of blocks stay gathered from the first
evaluation on, so that only evaluations communicate. All ranks of a group evaluate together, but each has its own
samples, which may need more evaluations than those of another: a rank that has finished evaluates one short sequence
for every evaluation of the others, until all have finished.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from scmdm.config.distributed import FsdpConfig
from scmdm.diffusion.state import NO_LABEL, State
from scmdm.distributed.engine import compute_context
from scmdm.distributed.fsdp import make_mesh
from scmdm.errors import UserError
from scmdm.models.network import Network

_SHORTEST = 2  # tokens of the sequence that a finished rank evaluates


def shard_for_evaluation(model: Network, shards: int, device: torch.device) -> dist.ProcessGroup:
    """Shard a model that is not yet allocated over each `shards` consecutive ranks; return this rank's group.

    Weights are gathered in the dtype in which they are held, so that results are those of the whole model. Raises
    UserError if the number of ranks is not a multiple of `shards`.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks % shards:
        raise UserError(f"shards={shards} is not possible with {ranks} processes; it must divide their number")
    mesh = make_mesh(FsdpConfig(replicate=ranks // shards), device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    return mesh.get_group("shard")


class ShardedEvaluations:
    """Evaluations of a sharded model, which all ranks of a group begin together.

    It takes the place of the model's method `hidden`, through which every evaluation goes.
    """

    def __init__(self, model: Network, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._group, self._device, self._dtype = model, group, device, dtype
        self._hidden: Callable[..., Tensor] = model.hidden
        model.hidden = self.hidden  # type: ignore[method-assign]
        model.lower = lambda *_, **__: None  # type: ignore[method-assign]  # peers take part in whole evaluations

    def hidden(self, state: State, **options: Any) -> Tensor:
        """See `Network.hidden`."""
        self._announce(1)
        return self._hidden(state, **options)

    @torch.no_grad()
    def await_peers(self, on_evaluation: Callable[[], None]) -> None:
        """Take part in the evaluations of the other ranks until all ranks of the group call this."""
        z_BL = torch.full((1, _SHORTEST), self._model.mask_id, device=self._device)
        t_B = torch.ones(1, dtype=torch.float64, device=self._device)
        labels_B = torch.tensor([NO_LABEL], device=self._device) if self._model.config.labels else None
        with compute_context(self._device, self._dtype):
            while int(self._announce(0)):
                self._hidden(State(z_BL, t_B, labels_B=labels_B))
                on_evaluation()

    def _announce(self, evaluations: int) -> Tensor:
        """Return the sum of all ranks' `evaluations`. The host waits for it only where it reads the result."""
        total = torch.tensor(evaluations, device=self._device)
        dist.all_reduce(total, group=self._group)
        return total
