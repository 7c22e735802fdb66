"""The training objective: SUBS, NELBO and the two-pass self-conditioned loss (SCMDM, arXiv 2604.26985).

Legend: B batch, L length, D width, N masked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from scmdm.diffusion.process import NoisedBatch
from scmdm.diffusion.schedule import Schedule, loss_weight
from scmdm.diffusion.state import ResidualStream, State


class Denoiser(Protocol):
    """The interface of a network that the objective uses, with MDLM's SUBS parameterization.

    The mask's logit is minus infinity, and only masked positions are predicted. Others carry over: their loss is 0, and
    their estimate is the embedding of the token.
    """

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        """Return the residual stream (B, L, D) before the block at which the estimate enters, for `State.lower`.

        It does not depend on the estimate, so that all passes on one state share it. None if the estimate enters at the
        input, or if the denoiser shares nothing.
        """
        ...

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """Return the expected embedding (B, L, D) of the clean tokens.

        `dropout` applies dropout if the network is in training mode.
        """
        ...

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of `-log p(x | z, estimate)` over masked positions, and the unweighted terms.

        The sum is a differentiable scalar; the terms (B, L) are float32, detached, and 0 where not masked.
        """
        ...


@dataclass(frozen=True)
class ObjectiveOutput:
    """Sums over a micro-batch, to be divided by the valid tokens of the global batch."""

    loss: Tensor  # scalar, differentiable: sum of w(t) * nll
    weighted_nll_B: Tensor  # (B,) float64, no gradient: each sample's share of the loss
    passes: int  # denoiser evaluations


def token_weights(batch: NoisedBatch, schedule: Schedule) -> Tensor:
    """Return the loss weights `w(t) * 1[valid] * share` (B, L), float32."""
    weight = loss_weight(schedule, batch.t[:, None] if batch.block_t is None else batch.block_t).float()
    return (weight if batch.share is None else weight * batch.share[:, None]) * batch.valid


def clean_state_estimate(
    denoiser: Denoiser,
    states: Sequence[State],
    *,
    dropout: bool,
    stop_gradient: bool = True,
) -> Tensor:
    """Return the estimate (B, L, C) after a pass on each state, conditioned on the previous pass's (the first: null).

    With `stop_gradient` the passes run without gradients; otherwise the gradient of the loss flows through all of them.
    """
    estimate = None
    with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_gradient):
        for state in states:
            lower = state.lower.detach() if stop_gradient and state.lower is not None else state.lower
            estimate = denoiser.estimate(replace(state, estimate_BLD=estimate, lower=lower), dropout=dropout)
    assert estimate is not None
    return estimate


def _states_of_estimate(batch: NoisedBatch, state: State, passes: int) -> list[State]:
    """Return the states whose passes make the estimate for `state`; all but the last are not perturbed.

    As in sampling, the estimate of a position that is revealed on the way is its token.
    """
    states = [state] * passes
    if batch.rollout:
        following = [*(z_BL for z_BL, _ in batch.rollout[1:]), batch.z]
        states = [
            replace(state, z_BL=z_BL, t_B=t_B, next_BL=next_BL)
            for (z_BL, t_B), next_BL in zip(batch.rollout, following, strict=True)
        ]
    return [*states[:-1], replace(states[-1], perturbation_BLD=batch.perturbation)]


def with_lower(denoiser: Denoiser, state: State, *, dropout: bool = False) -> State:
    """Return the state with the result of `Denoiser.lower`, if the denoiser shares it between passes."""
    lower_BLD = denoiser.lower(state, dropout=dropout)
    return state if lower_BLD is None else replace(state, lower=ResidualStream(lower_BLD))


def self_conditioned_nelbo(
    denoiser: Denoiser,
    batch: NoisedBatch,
    schedule: Schedule,
    *,
    condition: bool,
    passes: int = 1,
    estimate_dropout: bool = True,
    stop_gradient: bool = True,
    share_lower: bool = False,
) -> ObjectiveOutput:
    """Return the NELBO of the second pass, conditioned on the estimate of the first where `batch.conditioned` is true.

    `condition=False` (rate 0) skips the first pass: the vanilla objective of masked diffusion. All ranks must pass the
    same value, because sharded ranks run the same collectives. With `share_lower` the blocks below the one at which the
    estimate enters run once for all passes (`Denoiser.lower`), with the second pass's dropout and gradient; the batch
    must not have a rollout. With a rollout (`NoisedBatch.rollout`), the estimate comes from a pass on each of its
    states, made for the tokens of the next one, as in sampling.
    """
    state = State(batch.z, batch.t, None, batch.packing, batch.labels, batch.clean)
    states: list[State] = []
    if condition:
        if share_lower:
            assert not batch.rollout
            state = with_lower(denoiser, state, dropout=True)
        states = _states_of_estimate(batch, state, passes)
        estimate = clean_state_estimate(denoiser, states, dropout=estimate_dropout, stop_gradient=stop_gradient)
        estimate = torch.where(batch.conditioned[:, None, None], estimate, 0)  # under one name: the other is freed
        state = replace(state, estimate_BLD=estimate)
    weight_BL = token_weights(batch, schedule)
    loss, nll_BL = denoiser.weighted_nll(state, batch.x, weight_BL)
    share_B = (nll_BL.double() * weight_BL).sum(1)
    return ObjectiveOutput(loss, share_B, passes=1 + len(states))
