"""The conditioner, through which the clean-state estimate enters the network: `h0 = E[z] + g(s)`, `g(null) = 0`.

No kind has biases, so that the null estimate is `s = 0`. In each, exactly one factor starts at zero: the adapted model
equals the base bitwise, and that factor has a gradient at the first step.

Legend: B batch, L length, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmdm.models.initialization import ZeroLinear

CONDITIONERS = ("projection", "norm", "mlp")


class Conditioner(nn.Module):
    """The map `g`, of one of three kinds.

    - "projection": `W s`, with `W = 0` at the start.
    - "norm": `gain * LayerNorm(W s)`, with `gain = 0` at the start (as Loopholing carries its hidden state).
    - "mlp": `W2 gelu(W1 s)`, with `W2 = 0` at the start.
    """

    starts_at = 0.0  # initial value of the gain

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        assert kind in CONDITIONERS, kind
        self.kind = kind
        self.proj = (ZeroLinear if kind == "projection" else nn.Linear)(width, width, bias=False)
        if kind == "norm":
            self.gain = nn.Parameter(torch.empty(width))
        if kind == "mlp":
            self.out = ZeroLinear(width, width, bias=False)

    def forward(self, estimate_BLD: Tensor) -> Tensor:
        """Map estimates (B, L, D) to the term (B, L, D) that is added to the embedding."""
        h = self.proj(estimate_BLD)
        if self.kind == "norm":
            return self.gain * F.layer_norm(h.float(), h.shape[-1:])
        return self.out(F.gelu(h)) if self.kind == "mlp" else h
