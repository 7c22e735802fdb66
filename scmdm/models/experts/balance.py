"""Update of the bias by which experts are chosen, and what a run logs of the load of experts.

Legend: M layers of experts, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scmdm.models.experts.router import routers_of


@torch.no_grad()
def update_balance(model: nn.Module, counts_ME: Tensor, rate: float) -> None:
    """Raise the bias of experts with fewer tokens than the mean by `rate`, and lower that of those with more.

    `counts_ME` are those of the global batch, so that all ranks make the same update.
    """
    for router, counts_E in zip(routers_of(model), counts_ME, strict=True):
        if router.balance is not None and router.weight.requires_grad:
            counts = counts_E.double()
            change_E = rate * (counts.mean() - counts).sign()
            bias = router.balance.expert_bias
            bias.add_(change_E.to(bias.device, bias.dtype))


def load_summary(counts_ME: Tensor) -> dict[str, float]:
    """Return the entropy of the loads over that of equal ones (mean of the layers), and the largest share of an expert.

    No token is ever dropped; the number is stated because other programs drop tokens.
    """
    shares_ME = counts_ME.double() / counts_ME.sum(1, keepdim=True)
    entropy_M = torch.special.entr(shares_ME).sum(1) / math.log(max(2, counts_ME.shape[1]))
    return {
        "expert_entropy": float(entropy_M.mean()),
        "expert_max_share": float(shares_ME.max()),
        "dropped_tokens": 0,
    }
