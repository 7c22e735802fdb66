"""Samplers of the reverse process, with or without the carried clean-state estimate.

The state is `(z, s)`: tokens and, for a self-conditioned model, the estimate of the last evaluation, which costs no
further evaluation. All draws are keyed, so that a sample does not depend on its batch. Unless positions are ranked by
confidence, those to reveal are chosen first, and logits are computed only there and for the estimate. Without a carried
estimate, sequences in which a step reveals nothing are not evaluated.

By SUBS, the estimate of an unmasked position is its token. A remasked position therefore carries the embedding of its
former token, or, with `remasked_estimate="null"`, nothing.

Legend: B batch, L length, D width, V vocabulary with the mask, N selected positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from scmdm.diffusion.guidance import Embedder, Guided, SamplingDenoiser
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.reveal_order import Problem, SamplerSettings, Step, make_plan
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import true_positions
from scmdm.diffusion.token_draw import certainty, draw_tokens, most_certain

_DRAW_ROWS = 512  # positions per draw, which bounds the memory of float64 logits and noise


@dataclass(frozen=True)
class Samples:
    """Result of a sampler: tokens (B, L) without masks, and denoiser evaluations, one per step (guided: two).

    Evaluations include those that were skipped because nothing would have used their result.
    """

    tokens: Tensor
    evaluations: int


@dataclass(frozen=True)
class Observation:
    """A step of the sampler. `logits` is computed on request, by another evaluation."""

    evaluations: int  # so far, with this step
    t_B: Tensor  # time of the denoiser's input
    z_BL: Tensor  # sequences after the step
    revealed_BL: Tensor  # mask of revealed positions
    logits: Callable[[Tensor], Tensor]  # maps a mask of positions (B, L) to logits (N, V), in row-major order


StepHook = Callable[[Observation], None]


@torch.no_grad()
def sample(
    denoiser: SamplingDenoiser,
    given_BL: Tensor,
    ids_B: Tensor,
    *,
    schedule: Schedule,
    settings: SamplerSettings,
    mask_id: int,
    seed: int,
    labels_B: Tensor | None = None,
    on_step: StepHook | None = None,
) -> Samples:
    """Fill the masked positions of `given_BL` (B, L), int64; other positions (a prompt, an infill frame) are kept.

    `ids_B` (int64) identify the samples: the same id, seed and settings give the same sample in any batch. `labels_B`
    (int64) are labels for a model that is conditioned on them, or NO_LABEL. `on_step` is called after
    every step, and does not influence the result.
    """
    z_BL, estimate, evaluations = given_BL, None, 0
    view = Guided(denoiser, labels_B, settings.guidance)
    problem = Problem(lambda: z_BL, given_BL, ids_B, schedule, mask_id, seed)
    for step in make_plan(problem, settings):
        before_BL, seen = z_BL, estimate
        evaluations += view.evaluations
        if settings.carry:
            z_BL, h_BLD = _advance(view, z_BL, estimate, step, ids_B, settings, seed)
            estimate = carried_estimate(view, h_BLD, z_BL, mask_id)
        else:
            z_BL = _advance_where_needed(view, z_BL, step, ids_B, settings, seed)
        revealed_BL = (before_BL == mask_id) & (z_BL != mask_id)
        if step.remask_BL is not None:
            z_BL = z_BL.masked_fill(step.remask_BL, mask_id)
            if estimate is not None and settings.remasked_estimate == "null":
                estimate = estimate.masked_fill(step.remask_BL[..., None], 0)
        if on_step is not None:
            logits = partial(_logits_at, view, before_BL, step.t_B, seen)
            on_step(Observation(evaluations, step.t_B, z_BL, revealed_BL, logits))
    assert not bool((z_BL == mask_id).any())
    return Samples(z_BL, evaluations)


def _logits_at(denoiser: Guided, z_BL: Tensor, t_B: Tensor, estimate_BLD: Tensor | None, select_BL: Tensor) -> Tensor:
    return denoiser.logits(denoiser.hidden(z_BL, t_B, estimate_BLD)[select_BL])


def _advance(
    denoiser: Guided,
    z_BL: Tensor,
    estimate_BLD: Tensor | None,
    step: Step,
    ids_B: Tensor,
    settings: SamplerSettings,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return the sequences after a step, and the hidden states (B, L, D)."""
    h_BLD = denoiser.hidden(z_BL, step.t_B, estimate_BLD)
    reveal_BL, drawn_N = _reveal(denoiser, h_BLD, step, ids_B, settings, seed)
    return z_BL.masked_scatter(reveal_BL, drawn_N), h_BLD


def _advance_where_needed(
    denoiser: Guided, z_BL: Tensor, step: Step, ids_B: Tensor, settings: SamplerSettings, seed: int
) -> Tensor:
    """Return the sequences after a step, evaluating only those in which a position is revealed."""
    needed_B = step.candidates_BL.any(1) if step.count_B is None else step.count_B > 0
    rows = needed_B.nonzero().squeeze(1)
    if not len(rows):
        return z_BL
    count = step.count_B[rows] if step.count_B is not None else None
    own = replace(step, t_B=step.t_B[rows], candidates_BL=step.candidates_BL[rows], count_B=count, remask_BL=None)
    advanced, _ = _advance(denoiser.at(rows), z_BL[rows], None, own, ids_B[rows], settings, seed)
    return z_BL.index_copy(0, rows, advanced)


def _reveal(
    denoiser: Guided, h_BLD: Tensor, step: Step, ids_B: Tensor, settings: SamplerSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """Return a mask (B, L) of revealed positions, and their tokens (N,) in row-major order."""
    candidates_BL = step.candidates_BL
    drawn_N, score_N = _draw(denoiser, h_BLD, step, ids_B, settings, seed)
    if step.count_B is None:
        return candidates_BL, drawn_N
    zeros_BL = torch.zeros(candidates_BL.shape, dtype=torch.float64, device=h_BLD.device)
    reveal_BL = most_certain(zeros_BL.masked_scatter(candidates_BL, score_N), candidates_BL, step.count_B)
    return reveal_BL, drawn_N[reveal_BL[candidates_BL]]


def _draw(
    denoiser: Guided, h_BLD: Tensor, step: Step, ids_B: Tensor, settings: SamplerSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """Return tokens (N,) at the candidates, and confidence scores (empty unless ranking by confidence)."""
    rows, columns = step.candidates_BL.nonzero(as_tuple=True)
    h_ND = h_BLD[rows, columns]
    keys_N = ids_B[rows] * step.candidates_BL.shape[1] + columns
    drawn, scores = [], []
    for h, keys in zip(h_ND.split(_DRAW_ROWS), keys_N.split(_DRAW_ROWS), strict=True):
        logits_NV = denoiser.logits(h)
        uniform_NV = keyed_uniform(seed, "token", step.index, keys, logits_NV.shape[1])
        drawn.append(
            draw_tokens(
                logits_NV,
                uniform_NV,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                gumbel=settings.gumbel,
            )
        )
        if step.count_B is not None:
            scores.append(certainty(settings.kind, logits_NV, drawn[-1]))
    return torch.cat(drawn), torch.cat(scores) if scores else h_ND.new_empty(0)


def carried_estimate(denoiser: Embedder, h_BLD: Tensor, z_BL: Tensor, mask_id: int) -> Tensor:
    """Return the estimate (B, L, D) for the next evaluation, whose input is `z_BL`.

    It is the expected embedding where `z_BL` is masked, predicted from `h_BLD`, and the token's embedding elsewhere.
    """
    at_N = true_positions(z_BL == mask_id)
    predicted_ND = denoiser.expected_embedding(h_BLD.flatten(0, 1)[at_N])
    return denoiser.embed(z_BL).flatten(0, 1).index_copy(0, at_N, predicted_ND).unflatten(0, z_BL.shape)
