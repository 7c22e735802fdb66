"""The conditioner, through which what is carried from the last evaluation enters the network.

Added: `h0 = E[z] + g(s)`, `g(null) = 0`. Interpolated, at masked positions: `h0 = E[m] + share(c) (s - E[m])`, where
`c` is the confidence of the prediction that `s` comes from.

No kind has biases, so that the null estimate is `s = 0`. In each, exactly one factor starts at zero: the adapted model
equals the base bitwise, and that factor has a gradient at the first step.

Legend: B batch, L length, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmdm.config.model import ModelConfig
from scmdm.models.initialization import ZeroLinear

CONDITIONERS = ("projection", "norm", "mlp")
CONDITIONER_PREFIX = "conditioner."  # of the names of its parameters in a model


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


class Interpolation(nn.Module):
    """The share of the estimate in a masked position, `strength * sigmoid(slope * (c - threshold))`.

    These are the three numbers that Soft-Masking learns (arXiv 2510.17206); there `strength` and `slope` are bounded,
    and `c` is the negative entropy. A negative slope gives uncertain positions the larger share, as residual context
    does (arXiv 2601.22954); training hardly ever changes its sign, so that `slope`, the initial one, decides.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.starts_at = {"strength": 0.0, "slope": slope, "threshold": 0.5}
        for name in self.starts_at:
            self.register_parameter(name, nn.Parameter(torch.empty(1)))

    def forward(self, confidence_BL1: Tensor) -> Tensor:
        """Return the share (B, L, 1), float32; 0 where the confidence is 0, which is that of the null estimate."""
        strength, slope, threshold = (self.get_parameter(name).float() for name in self.starts_at)
        share_BL1 = strength * torch.sigmoid(slope * (confidence_BL1.float() - threshold))
        return torch.where(confidence_BL1 > 0, share_BL1, 0)


def make_conditioner(config: ModelConfig) -> Conditioner | Interpolation | None:
    """Make the conditioner of a model; None for one that is not self-conditioned."""
    if not config.self_conditioned:
        return None
    if config.mixing == "interpolated":
        return Interpolation(config.confidence_slope)
    return Conditioner(config.width, config.conditioner)
