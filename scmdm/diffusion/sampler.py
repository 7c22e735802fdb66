"""Samplers of the reverse process, with or without the carried clean-state estimate.

The state is `(z, s)`: tokens and, for a self-conditioned model, the estimate of the last evaluation, which costs no
further evaluation. All draws are keyed, so that a sample does not depend on its batch. Unless positions are ranked by
confidence, or race with the mask, those to reveal are chosen first, and logits are computed only there and for the
estimate. Without a carried estimate, or with `idle_steps="skip"`, sequences in which a step reveals nothing are not
evaluated. Sequences of different lengths are padded at their end, and nothing attends to padding.

By SUBS, the estimate of an unmasked position is its token. A remasked position therefore carries the embedding of its
former token, or, with `remasked_estimate="null"`, nothing.

With a cache of keys and values (`scmdm.diffusion.cached_windows`), an evaluation computes a window of positions alone.
Neither evaluations nor draws change. For a model of blocks, nor do the predictions, up to rounding.

Legend: B batch, L length, D width, V vocabulary with the mask, N selected positions, W positions of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scmdm.diffusion.cached_windows import CacheDeviation, CachedWindows
from scmdm.diffusion.guidance import Guided, SamplingDenoiser
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.packing import pack_padded
from scmdm.diffusion.reveal_order import Problem, SamplerSettings, Step, make_plan
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.token_draw import (
    certainty,
    count_by_factor,
    count_confident,
    draw_tokens,
    draw_tokens_or_mask,
    most_certain,
    perturbed,
    shape_logits,
    without,
)

DRAW_ROWS = 512  # positions per draw, which bounds the memory of float64 logits and noise
# Settings of the distribution that tokens are drawn from.
_SHAPE = ("temperature", "top_k", "top_p", "top_p_first", "top_p_rule")
_LONGEST = 2**20  # tokens of a sequence whose draws must not depend on the length that it is padded to


@dataclass(frozen=True)
class Samples:
    """Result of a sampler: tokens (B, L) without masks, and what each sequence cost (B,), int64.

    A step is one evaluation, guided two. Evaluations include those that were skipped because nothing would have used
    their result, but not those of steps that concern other sequences of the batch alone. Positions are those that the
    denoiser has computed: its length, or with a cache its window, for each evaluation that was not skipped; padding is
    not counted.
    """

    tokens: Tensor
    evaluations_B: Tensor
    positions_B: Tensor
    deviation: CacheDeviation = field(default_factory=CacheDeviation)

    @property
    def evaluations(self) -> int:
        """Largest number of evaluations of a sequence."""
        return int(self.evaluations_B.max())


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
    lengths_B: Tensor | None = None,
    on_step: StepHook | None = None,
) -> Samples:
    """Fill the masked positions of `given_BL` (B, L), int64; other positions (a prompt, an infill frame) are kept.

    `ids_B` (int64) identify the samples: the same id, seed and settings give the same sample in any batch. `labels_B`
    (int64) are labels for a model that is conditioned on them, or NO_LABEL. `lengths_B` (int64) are the tokens of each
    sequence, which is padded with any other token than the mask. `on_step` is called after every step, and does not
    influence the result.
    """
    if settings.block_length != (size := getattr(denoiser, "block_length", None)) and size is not None:
        raise ValueError(f"the denoiser predicts blocks of {size} tokens, not of {settings.block_length}")
    z_BL, evaluations = given_BL, 0
    estimate: Tensor | None = None
    evaluations_B = torch.zeros_like(ids_B)
    view = _view(denoiser, given_BL, labels_B, lengths_B, settings, mask_id)
    draws = _Draws(settings, seed, given_BL.shape[1] if lengths_B is None else _LONGEST)
    windows = CachedWindows(settings, view.evaluations, *given_BL.shape, device=given_BL.device, lengths_B=lengths_B)
    problem = Problem(lambda: z_BL, given_BL, ids_B, schedule, mask_id, seed, lengths_B)
    last: Step | None = None
    for step in make_plan(problem, settings):
        if estimate is not None and last is not None and settings.model_of_blocks:
            estimate = _of_same_block(estimate, last, step)
        last = step
        before_BL, seen = z_BL, estimate
        evaluations += view.evaluations
        evaluations_B += view.evaluations * (1 if step.active_B is None else step.active_B)
        z_BL, estimate = _advance(view, z_BL, estimate, step, ids_B, draws, windows)
        revealed_BL = (before_BL == mask_id) & (z_BL != mask_id)
        if step.remask_BL is not None:
            z_BL = z_BL.masked_fill(step.remask_BL, mask_id)
            if estimate is not None and settings.remasked_estimate == "null":
                estimate = estimate.masked_fill(step.remask_BL[..., None], 0)
        if on_step is not None:
            logits = partial(_logits_at, view, before_BL, step.t_B, seen)
            on_step(Observation(evaluations, step.t_B, z_BL, revealed_BL, logits))
    assert not bool((z_BL == mask_id).any())
    return Samples(z_BL, evaluations_B, windows.positions_B, windows.deviation)


def _of_same_block(estimate_BLD: Tensor, last: Step, step: Step) -> Tensor:
    """Return the estimate that the last step has made of this step's block; null elsewhere, and in another block."""
    parts = (last.block_B, step.block_B, step.first_B, step.end_B)
    last_block_B, block_B, first_B, end_B = (part for part in parts if part is not None)
    at_L = torch.arange(estimate_BLD.shape[1], device=estimate_BLD.device)
    same_BL = (at_L >= first_B[:, None]) & (at_L < end_B[:, None]) & (block_B == last_block_B)[:, None]
    return estimate_BLD.masked_fill(~same_BL[..., None], 0)


def _view(
    denoiser: SamplingDenoiser,
    given_BL: Tensor,
    labels_B: Tensor | None,
    lengths_B: Tensor | None,
    settings: SamplerSettings,
    mask_id: int,
) -> Guided:
    prompt_BL = given_BL != mask_id if settings.guided_by == "prompt" else None
    packing = None if lengths_B is None else pack_padded(lengths_B, given_BL.shape[1])
    return Guided(denoiser, mask_id, labels_B, settings.guidance, prompt_BL, packing)


def _logits_at(denoiser: Guided, z_BL: Tensor, t_B: Tensor, estimate_BLD: Tensor | None, select_BL: Tensor) -> Tensor:
    return denoiser.logits(denoiser.hidden(z_BL, t_B, estimate_BLD)[select_BL])


@dataclass(frozen=True)
class _Draws:
    """What determines the draws of a call of `sample`, besides its ids."""

    settings: SamplerSettings
    seed: int
    stride: int  # keys of positions: `id * stride + position`


def _advance(
    view: Guided,
    z_BL: Tensor,
    estimate_BLD: Tensor | None,
    step: Step,
    ids_B: Tensor,
    draws: _Draws,
    windows: CachedWindows,
) -> tuple[Tensor, Tensor | None]:
    """Return sequences and estimate after a step, evaluating only the sequences that need it.

    With a carried estimate that idle steps refine, these are all that the step concerns, otherwise those in which it
    reveals a position.
    """
    carry = draws.settings.carry
    needed_B = step.active_B if carry and draws.settings.idle_steps == "evaluate" else _reveals(step)
    if not windows.cached and (needed_B is None or (carry and bool(needed_B.all()))):
        windows.count_all()
        z_BL, h_BLD = _evaluate(view, z_BL, estimate_BLD, step, ids_B, draws)
        return z_BL, view.carried_estimate(h_BLD, z_BL) if carry else None
    rows = torch.arange(len(z_BL), device=z_BL.device) if needed_B is None else needed_B.nonzero().squeeze(1)
    if not len(rows):
        return z_BL, estimate_BLD
    if windows.cached:
        return _advance_windows(view, z_BL, estimate_BLD, step, ids_B, draws, windows, rows)
    windows.count(rows, z_BL.shape[1])
    own = step.at(rows)
    seen = None if estimate_BLD is None else estimate_BLD[rows]
    part = view.at(rows)
    advanced, h_BLD = _evaluate(part, z_BL[rows], seen, own, ids_B[rows], draws)
    z_BL = z_BL.index_copy(0, rows, advanced)
    if not carry:
        return z_BL, None
    new = part.carried_estimate(h_BLD, advanced)
    if estimate_BLD is None:  # null for the sequences that have not been evaluated
        estimate_BLD = new.new_zeros(len(z_BL), *new.shape[1:])
    return z_BL, estimate_BLD.index_copy(0, rows, new)


def _advance_windows(
    view: Guided,
    z_BL: Tensor,
    estimate_BLD: Tensor | None,
    step: Step,
    ids_B: Tensor,
    draws: _Draws,
    windows: CachedWindows,
    rows: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return sequences and estimate after a step, of whose sequences `rows` a window is evaluated."""
    for own_rows, window in windows.of(step, rows):
        own, own_z = step.at(own_rows), z_BL[own_rows]
        seen = None if estimate_BLD is None else estimate_BLD[own_rows]
        part = view.at(own_rows)
        windowed = part.within(window)
        h_BWD = windowed.hidden(window.cut(own_z), own.t_B, None if seen is None else window.cut(seen))
        checked_N = windows.to_check(own_rows, window)
        if len(checked_N):
            estimates = None if seen is None else seen[checked_N]
            exact_NLD = part.at(checked_N).hidden(own_z[checked_N], own.t_B[checked_N], estimates)
            exact_ND = exact_NLD[own.candidates_BL[checked_N]]
            windows.compare(part, h_BWD[checked_N][window.cut(own.candidates_BL)[checked_N]], exact_ND)
        reveal_BL, drawn_N = _reveal(part, h_BWD, own, ids_B[own_rows], draws, window.start_B)
        advanced = own_z.masked_scatter(reveal_BL, drawn_N)
        z_BL = z_BL.index_copy(0, own_rows, advanced)
        if not draws.settings.carry:
            continue
        new = windowed.carried_estimate(h_BWD, window.cut(advanced))
        if estimate_BLD is None:
            estimate_BLD = new.new_zeros(*z_BL.shape, new.shape[-1])
        estimate_BLD = estimate_BLD.index_put((own_rows[:, None], window.columns_BW), new)
    return z_BL, estimate_BLD


def _reveals(step: Step) -> Tensor:
    """Return the sequences (B,) in which a step reveals a position."""
    return step.candidates_BL.any(1) if step.count_B is None else step.count_B > 0


def _evaluate(
    view: Guided, z_BL: Tensor, estimate_BLD: Tensor | None, step: Step, ids_B: Tensor, draws: _Draws
) -> tuple[Tensor, Tensor]:
    """Return the sequences after a step, and the hidden states (B, L, G D)."""
    h_BLD = view.hidden(z_BL, step.t_B, estimate_BLD)
    reveal_BL, drawn_N = _reveal(view, h_BLD, step, ids_B, draws)
    return z_BL.masked_scatter(reveal_BL, drawn_N), h_BLD


def _reveal(
    view: Guided, h_BLD: Tensor, step: Step, ids_B: Tensor, draws: _Draws, start_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a mask (B, L) of revealed positions, and their tokens (N,) in row-major order.

    With `start_B`, the hidden states are those of windows that begin there, and contain all candidates.
    """
    candidates_BL, settings = step.candidates_BL, draws.settings
    drawn_N, score_N = _draw(view, h_BLD, step, ids_B, draws, start_B)
    if step.reveal_B is not None:
        revealed_N = drawn_N != view.mask_id
        return candidates_BL.masked_scatter(candidates_BL, revealed_N), drawn_N[revealed_N]
    if step.count_B is None:
        return candidates_BL, drawn_N
    zeros_BL = torch.zeros(candidates_BL.shape, dtype=torch.float64, device=h_BLD.device)
    score_BL, count_B = zeros_BL.masked_scatter(candidates_BL, score_N), step.count_B
    if settings.threshold is not None:
        count_B = count_confident(score_BL, candidates_BL, settings.threshold)
    elif settings.factor is not None:
        count_B = count_by_factor(score_BL, candidates_BL, settings.factor)
    elif settings.alg_temp:
        u_BL = keyed_uniform(draws.seed, "order", step.index, ids_B, score_BL.shape[1])
        score_BL = perturbed(score_BL, u_BL, settings.alg_temp)
    reveal_BL = most_certain(score_BL, candidates_BL, count_B)
    return reveal_BL, drawn_N[reveal_BL[candidates_BL]]


def _draw(
    view: Guided, h_BLD: Tensor, step: Step, ids_B: Tensor, draws: _Draws, start_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return tokens (N,) at the candidates, and confidence scores (empty unless ranking by confidence).

    Where the step has a probability to reveal a candidate, the mask in place of a token leaves it masked.
    """
    rows, columns = step.candidates_BL.nonzero(as_tuple=True)
    h_ND = h_BLD[rows, columns if start_B is None else columns - start_B[rows]]
    settings = draws.settings
    keys_N = ids_B[rows] * draws.stride + columns
    shape: dict[str, Any] = {name: getattr(settings, name) for name in _SHAPE}
    if step.greedy:
        shape["temperature"] = 0.0
    drawn, scores = [], []
    for h, keys, at in zip(*(x.split(DRAW_ROWS) for x in (h_ND, keys_N, rows)), strict=True):
        logits_NV = without(view.logits(h), settings.never_ids)
        # At temperature 0 nothing is drawn but whether to reveal.
        needed = step.reveal_B is not None or shape["temperature"] > 0
        width = logits_NV.shape[1] if needed else 0
        uniform_NV = keyed_uniform(draws.seed, "token", step.index, keys, width)
        if step.reveal_B is not None:
            drawn.append(draw_tokens_or_mask(logits_NV, uniform_NV, step.reveal_B[at], view.mask_id, **shape))
        else:
            drawn.append(draw_tokens(logits_NV, uniform_NV, gumbel=settings.gumbel, **shape))
        if step.count_B is not None:
            ranked_NV = shape_logits(logits_NV, **shape) if settings.tempered_order else logits_NV
            scores.append(certainty(settings.kind, ranked_NV, drawn[-1], late_ids=settings.late_ids))
    return torch.cat(drawn), torch.cat(scores) if scores else h_ND.new_empty(0)
