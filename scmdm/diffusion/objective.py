"""The training objective: SUBS, NELBO and the two-pass self-conditioned loss (SCMDM, arXiv 2604.26985).

Legend: B batch, L length, D width, N masked positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scmdm.diffusion.process import NoisedBatch
from scmdm.diffusion.schedule import Schedule, loss_weight
from scmdm.diffusion.state import State


class Denoiser(Protocol):
    """What the objective needs of a network. SUBS holds inside: the mask logit is minus infinity, and only masked
    positions are ever predicted (others carry over: their loss is 0 and their estimate is the token itself)."""

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """Expected embedding (B, L, D) of the clean tokens. `dropout` leaves a network that is in training mode its
        dropout."""
        ...

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over masked positions of `weight * -log p(x | z, estimate)` (scalar, differentiable) and the unweighted
        per-token values (B, L), float32, 0 where not masked, without gradient."""
        ...


@dataclass(frozen=True)
class ObjectiveOutput:
    """Sums over a micro-batch; the caller divides by the valid tokens of the global batch."""

    loss: Tensor  # scalar, differentiable: sum of w(t) * nll
    weighted_nll_B: Tensor  # (B,) float64, no gradient: each sample's share of the loss
    passes: int  # denoiser evaluations


def token_weights(batch: NoisedBatch, schedule: Schedule) -> Tensor:
    """`w(t) * 1[valid]` (B, L) float32."""
    return loss_weight(schedule, batch.t)[:, None].float() * batch.valid


def clean_state_estimate(
    denoiser: Denoiser, batch: NoisedBatch, *, passes: int, dropout: bool, stop_gradient: bool = True
) -> Tensor:
    """The estimate (B, L, D) after `passes` passes: the first sees null, each further one the last one's.

    With `stop_gradient` they run without gradients. Without it the estimate is a function of the weights like any
    other: the loss's gradient flows through all passes, the embeddings among their factors included.
    """
    estimate = None
    with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_gradient):
        for _ in range(passes):
            state = State(batch.z_estimate, batch.t_estimate, estimate, batch.packing, batch.labels)
            estimate = denoiser.estimate(state, dropout=dropout)
    assert estimate is not None
    return estimate


def self_conditioned_nelbo(
    denoiser: Denoiser,
    batch: NoisedBatch,
    schedule: Schedule,
    *,
    condition: bool,
    passes: int = 1,
    estimate_dropout: bool = True,
    stop_gradient: bool = True,
) -> ObjectiveOutput:
    """NELBO of the second pass, conditioned where `batch.conditioned` says so (design: one adaptation step).

    `condition=False` (rate 0) skips pass 1 altogether; it is the vanilla MDM objective. Whether pass 1 runs must not
    depend on this rank's coins: under sharding all ranks run the same collectives.
    """
    estimate = None
    if condition:
        estimate = clean_state_estimate(
            denoiser, batch, passes=passes, dropout=estimate_dropout, stop_gradient=stop_gradient
        )
        estimate = torch.where(batch.conditioned[:, None, None], estimate, 0)
    weight_BL = token_weights(batch, schedule)
    state = State(batch.z, batch.t, estimate, batch.packing, batch.labels)
    loss, nll_BL = denoiser.weighted_nll(state, batch.x, weight_BL)
    share_B = (nll_BL.double() * weight_BL).sum(1)
    return ObjectiveOutput(loss, share_B, passes=1 + (passes if condition else 0))
