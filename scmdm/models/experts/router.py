"""Router of a mixture of experts: which experts each token goes to, and with which weights.

Scores are the softmax or the sigmoid of a linear map in float32. The `per_token` experts with the highest scores are
chosen, optionally among the best groups of experts alone (arXiv 2412.19437). A bias that training updates without a
gradient can be added to the scores for the choice, not for the weights (arXiv 2408.15664).

Legend: B sequences, L length, N tokens, D width, E experts, T experts per token, G groups of experts,
S groups that a token may go to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmdm.models.experts.routing_record import RoutingRecord

_LEAST_SUM = 1e-20  # as in the published routers
_RANKED_BY = 2  # a group of experts is ranked by the sum of its highest scores


class Routing(NamedTuple):
    """The experts of each token."""

    experts_NT: Tensor  # int64
    weights_NT: Tensor  # float32


class ExpertBalance(nn.Module):
    """Bias of the scores by which experts are chosen. It has no gradient; `update_balance` changes it."""

    starts_at = 0.0

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.expert_bias = nn.Parameter(torch.empty(experts), requires_grad=False)


class Router(nn.Module):
    """Choose experts for tokens, in float32 under autocast, too."""

    def __init__(
        self,
        width: int,
        experts: int,
        per_token: int,
        *,
        sigmoid: bool,
        groups: int,
        top_groups: int,
        scale: float,
        renormalise: bool,
        balanced: bool,
    ) -> None:
        super().__init__()
        self.per_token, self.sigmoid, self.renormalise, self.scale = per_token, sigmoid, renormalise, scale
        self.groups, self.top_groups = groups, top_groups
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.balance = ExpertBalance(experts) if balanced else None
        self.record: RoutingRecord | None = None
        self.number = 0  # of this router in the record

    def forward(self, x_BLD: Tensor) -> Routing:
        """Return the routing of all tokens, and add their counts and loss terms to the record, if there is one."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            logits_NE = F.linear(x_BLD.flatten(0, 1).float(), self.weight.float())
            scores_NE = logits_NE.sigmoid() if self.sigmoid else logits_NE.softmax(-1)
            experts_NT = self._choose(scores_NE.detach())
            weights_NT = scores_NE.gather(1, experts_NT)
            if self.renormalise:
                weights_NT = weights_NT / (weights_NT.sum(1, keepdim=True) + _LEAST_SUM)
            if self.record is not None and torch.is_grad_enabled():
                self.record.add(self.number, logits_NE, scores_NE, experts_NT, sequences=len(x_BLD))
        return Routing(experts_NT, weights_NT if self.scale == 1 else self.scale * weights_NT)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        if self.balance is not None:
            scores_NE = scores_NE + self.balance.expert_bias.to(scores_NE.device, torch.float32)
        if self.top_groups < self.groups:
            grouped = scores_NE.unflatten(1, (self.groups, -1))
            best_NS = grouped.topk(_RANKED_BY, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            closed_NG = torch.ones(len(grouped), self.groups, dtype=torch.bool, device=grouped.device)
            closed_NG = closed_NG.scatter(1, best_NS, False)
            scores_NE = grouped.masked_fill(closed_NG[..., None], -torch.inf).flatten(1)
        return scores_NE.topk(self.per_token, dim=-1).indices


def routers_of(model: nn.Module) -> list[Router]:
    """Return the routers of a model in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, Router)]


def attach_record(model: nn.Module, *, balance_loss: float, z_loss: float) -> RoutingRecord | None:
    """Give the routers of a model a common record; None if it has no routers."""
    routers = routers_of(model)
    if not routers:
        return None
    record = RoutingRecord(len(routers), balance_loss=balance_loss, z_loss=z_loss)
    for number, router in enumerate(routers):
        router.record, router.number = record, number
    return record


def record_of(model: nn.Module) -> RoutingRecord | None:
    """Return the record of a model's routers; None if it has no routers, or none was attached."""
    return next((router.record for router in routers_of(model)), None)
