"""Noise schedules of the absorbing process: `alpha_t` is the probability that a token is still clean at time t.

Legend: any shape in, the same shape out; times in float64 or float32, t in [0, 1], alpha_0 = 1; alpha_1 = 0 if eps = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """A decreasing, differentiable `alpha_t` on [0, 1] with its derivative and inverse."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the probability that a token is clean at time t."""
        ...

    def d_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative of `alpha` with respect to t, which is negative."""
        ...

    def inverse(self, alpha: Tensor) -> Tensor:
        """Return the time at which `alpha_t` has this value."""
        ...


@dataclass(frozen=True)
class LogLinear:
    """`alpha_t = 1 - (1 - eps) t`. `eps = 1e-3` is MDLM's constant; `eps = 0` masks everything at t = 1."""

    eps: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1 - self.eps))

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) / (1 - self.eps)


@dataclass(frozen=True)
class Cosine:
    """`alpha_t = 1 - cos(pi/2 (1 - (1 - eps) t))`: with `eps = 0` MaskGIT's masking rate, with `eps = 1e-3` Duo's."""

    eps: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - (1 - self.eps) * t))

    def d_alpha(self, t: Tensor) -> Tensor:
        # Duo's code lacks the factor 1 - eps.
        return -(1 - self.eps) * math.pi / 2 * torch.sin(math.pi / 2 * (1 - (1 - self.eps) * t))

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - torch.acos((1 - alpha).clamp(0, 1)) * (2 / math.pi)) / (1 - self.eps)


@dataclass(frozen=True)
class Polynomial:
    """`alpha_t = 1 - t^power` (MD4, arXiv 2406.04329); `power = 1` is log-linear."""

    power: float = 2.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha).clamp(0, 1) ** (1 / self.power)


def make_schedule(kind: str, *, eps: float = 0.0, power: float = 2.0) -> Schedule:
    """Return the schedule named `kind`: "log_linear", "cosine" (both use `eps`) or "polynomial" (uses `power`)."""
    if kind == "log_linear":
        return LogLinear(eps)
    if kind == "polynomial":
        return Polynomial(power)
    assert kind == "cosine", kind
    return Cosine(eps)


def noise_level(schedule: Schedule, t: Tensor) -> Tensor:
    """Return `-log(alpha_t)`, which networks are conditioned on.

    It is bounded where alpha is 1e-3, the end of MDLM's schedule, except with Duo's cosine, which ends lower.
    """
    alpha, unbounded = schedule.alpha(t), isinstance(schedule, Cosine) and schedule.eps > 0
    return -(alpha if unbounded else alpha.clamp(min=1e-3)).log()


def loss_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """Return the NELBO's weight of a masked token, `-alpha'_t / (1 - alpha_t)` (MDLM eq. 10); 1/t for log-linear."""
    return -schedule.d_alpha(t) / (1 - schedule.alpha(t))


def unmask_probability(schedule: Schedule, t: Tensor, t_next: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """Return the probability that a token masked at t is clean at `t_next = s < t`.

    It is `(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)` if clean tokens are remasked with probability `sigma`
    (ReMDM, arXiv 2503.00307, eq. 3).
    """
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(t_next)
    return ((alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)).clamp(0, 1)


def remask_probability(schedule: Schedule, t: Tensor, t_next: Tensor, kind: str, eta: float) -> Tensor:
    """Return `sigma_t`, the probability that a clean token is remasked from t to `t_next = s` (ReMDM, section 4.1).

    At most `min(1, (1 - alpha_s) / alpha_t)` is possible with the marginals of the process. "cap" limits it to `eta`,
    "rescale" takes the fraction `eta` of it, "never" is 0.
    """
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(t_next)
    most = ((1 - alpha_s) / alpha_t).clamp(max=1)
    if kind == "cap":
        return most.clamp(max=eta)
    return eta * most if kind == "rescale" else torch.zeros_like(most)
