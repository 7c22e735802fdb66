"""Expert parallelism: the ranks of a group share the experts of each layer, and send tokens to each other.

Rank r of N holds experts r E / N to (r + 1) E / N. A rank sorts the copies of its tokens by expert, tells the others
how many they get of each, and sends them; the holder sorts what it received by expert, applies them, and sends the
results back. Every rank takes part in every exchange, also with no row to send or to receive, so that collectives do
not depend on what routers choose. A rank has memory for the rows that it sends and for those that it receives: with
balanced loads, both are its tokens times the experts of each.

Legend: D width, E experts, H experts of this rank, N ranks of the group, P rows that this rank sends, Q rows that it
receives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmdm.config.model import ModelConfig
from scmdm.torch_private import is_fake


def expert_ranks_refused(model: ModelConfig, experts: int) -> str | None:
    """Return why the ranks of `fsdp.experts` cannot share the experts of a model; None if they can."""
    if experts == 1:
        return None
    if not model.experts:
        return f"fsdp.experts={experts} is not possible with model.experts=0; set it to 1"
    if model.experts % experts:
        return f"fsdp.experts={experts} is not possible; it must divide model.experts={model.experts}"
    return None


class ExpertGroup:
    """The ranks that share the experts of each layer, in the order of their experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks, self.rank, self._group = dist.get_world_size(group), dist.get_rank(group), group

    def all_to_all(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Send consecutive rows of `sent` to the ranks in turn, and fill `received` with theirs."""
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self._group)


class ExpertExchange:
    """The way of rows, sorted by expert, to the ranks that hold their experts, and back."""

    def __init__(self, group: ExpertGroup, counts_E: Tensor, rows: int) -> None:
        """Tell every rank of the group how many rows it gets; `counts_E` are this rank's `rows` by expert.

        The host waits for the counts, because sizes of buffers depend on them.
        """
        self._group = group
        counts_NH = counts_E.view(group.ranks, -1)
        counted_NH, equal = torch.empty_like(counts_NH), [1] * group.ranks
        group.all_to_all(counted_NH, counts_NH, equal, equal)
        if is_fake(counts_E):  # without values: as with balanced loads
            self._sent = self._received = [len(part) for part in torch.empty(rows).tensor_split(group.ranks)]
        else:
            self._sent, self._received = torch.stack([counts_NH.sum(1), counted_NH.sum(1)]).tolist()
        self._rows = sum(self._received)
        held_NH = torch.arange(counts_NH.shape[1], device=counts_E.device).expand_as(counts_NH)
        expert_Q = held_NH.flatten().repeat_interleave(counted_NH.flatten(), output_size=self._rows)
        #: expert of each received row, numbered among those of this rank
        self.expert_Q = expert_Q if self._rows else expert_Q.new_zeros(1)

    def send(self, x_PD: Tensor) -> Tensor:
        """Return the rows (Q, D) that the ranks have sent to this one, by rank.

        Without any there is a row of zeros, because products need one.
        """
        x_QD: Tensor = _Exchange.apply(x_PD, self._group, self._received, self._sent)
        return x_QD if self._rows else F.pad(x_QD, (0, 0, 0, 1))

    def send_back(self, y_QD: Tensor) -> Tensor:
        """Return the results (P, D) of the rows that this rank has sent."""
        y_PD: Tensor = _Exchange.apply(y_QD[: self._rows], self._group, self._sent, self._received)
        return y_PD


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows, whose backward pass is the opposite one."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, group: ExpertGroup, received: list[int], sent: list[int]) -> Tensor:
        ctx.given = group, sent, received
        return _exchanged(x_PD, group, received, sent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_QD: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(d_QD, *ctx.given), None, None, None


def _exchanged(x_PD: Tensor, group: ExpertGroup, received: list[int], sent: list[int]) -> Tensor:
    x_QD = x_PD.new_empty(sum(received), x_PD.shape[1])
    group.all_to_all(x_QD, x_PD.contiguous(), received, sent)
    return x_QD
