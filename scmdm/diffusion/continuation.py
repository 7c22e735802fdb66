"""Likelihood of a continuation given its context, and comparison with greedy decoding.

The likelihood of n tokens is bounded by revealing them in a uniformly random order, each predicted from the tokens that
are not masked. The bound is a sum over the sets S of masked tokens,

    -log p(x) <= sum_S  1 / (|S| C(n, |S|))  sum_{i in S} -log p(x_i | x without S),

which is the NELBO of the absorbing process, whatever its schedule. If there are few sets, all are enumerated; otherwise
some are drawn, with |S| uniform on 1 ... n and weight n / |S| (LLaDA, arXiv 2502.09992).

A model of blocks (`scmdm.diffusion.blocks`) predicts each block given all earlier tokens: its bound is the sum of those
of the blocks, and one evaluation has a state of each block.

Legend: B batch (states), L length, N tokens of a continuation, K states of it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from scmdm.diffusion.guidance import Guided, SamplingDenoiser
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.objective import Denoiser, with_lower
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import State
from scmdm.diffusion.token_draw import certainty, most_certain

_CHUNK = 2048  # positions whose guided logits are held at once


class ScoringDenoiser(Denoiser, SamplingDenoiser, Protocol):
    """The interface of a network that likelihoods use."""


@dataclass(frozen=True)
class States:
    """Masked tokens of a continuation in each of its states, and the weight of each token's loss."""

    masked_KN: Tensor  # bool
    weight_KN: Tensor  # float64, 0 where not masked


def masked_states(
    n: int, draws: int, *, seed: int, key: int, start: int = 0, block_length: int | None = None
) -> States:
    """Return all states of a continuation of `n` tokens if there are at most `draws`, otherwise `draws` random ones.

    Random states depend on `seed` and `key` alone, and their numbers of masks are stratified. With `block_length`,
    these are the states of each block by itself; the continuation begins at position `start`.
    """
    assert n >= 1
    assert draws >= 1
    borders = [0, n]
    if block_length is not None:
        borders = [0, *range(block_length - start % block_length, n, block_length), n]
    parts = [
        _states_of_part(end - begin, draws, seed, key, part)
        for part, (begin, end) in enumerate(itertools.pairwise(borders))
    ]
    most = max(len(part.masked_KN) for part in parts)
    masked_KN, weight_KN = (
        torch.cat([pad(getattr(part, name), (0, 0, 0, most - len(part.masked_KN))) for part in parts], 1)
        for name in ("masked_KN", "weight_KN")
    )
    return States(masked_KN, weight_KN)


def _states_of_part(n: int, draws: int, seed: int, key: int, part: int) -> States:
    if 2**n - 1 <= draws:
        sets_K = torch.arange(1, 2**n)
        masked_KN = (sets_K[:, None] >> torch.arange(n)) % 2 == 1
        counts = masked_KN.sum(1).tolist()
        weight_K = torch.tensor([1 / (k * math.comb(n, k)) for k in counts], dtype=torch.float64)
        return States(masked_KN, weight_K[:, None] * masked_KN)
    own, name = torch.tensor([key]), f"/{part}" if part else ""
    u = keyed_uniform(seed, f"continuation-count{name}", 0, own, 1)[0, 0]
    count_K = 1 + ((u + torch.arange(draws).double() / draws) % 1.0 * n).long().clamp(max=n - 1)
    u_KN = keyed_uniform(seed, f"continuation-mask{name}", 0, own, draws * n).view(draws, n)
    masked_KN = u_KN.argsort(1).argsort(1) < count_K[:, None]
    return States(masked_KN, (n / (count_K.double() * draws))[:, None] * masked_KN)


@torch.no_grad()
def masked_nll(
    denoiser: ScoringDenoiser,
    x_BL: Tensor,
    mtarget_BL: Tensor,
    weight_BL: Tensor,
    share_B: Tensor,
    *,
    schedule: Schedule,
    mask_id: int,
    condition: bool,
    guidance: float = 1.0,
    prompt_BL: Tensor | None = None,
    model_of_blocks: bool = False,
) -> Tensor:
    """Return the sums (B,), float64, of `-log p(x_i | z)` over the positions of each state, times `weight_BL`, float64.

    `share_B` is the masked fraction of the continuation, which determines the time for a network with time
    conditioning. `condition` conditions each state on the estimate of a first pass over it, as in training. Tokens at
    other masked positions have no influence, but must not be the mask. With `guidance`, the likelihood is that of the
    guided distribution, whose other prediction has `prompt_BL` masked; this is not possible for a `model_of_blocks`,
    which predicts each block from the tokens `x_BL` of earlier ones.
    """
    z_BL = x_BL.masked_fill(mtarget_BL, mask_id)
    t_B = schedule.inverse(1 - share_B).clamp(max=1)
    if guidance != 1:
        view = Guided(denoiser, mask_id, None, guidance, prompt_BL)
        assert not model_of_blocks
        return _guided_nll(view, z_BL, t_B, x_BL, weight_BL, condition=condition)
    state = State(z_BL, t_B, clean_BL=x_BL if model_of_blocks else None)
    if condition:
        state = with_lower(denoiser, state)
        state = replace(state, estimate_BLD=denoiser.estimate(state))
    _, nll_BL = denoiser.weighted_nll(state, x_BL, weight_BL.float())
    return (nll_BL.double() * weight_BL).sum(1)


def _guided_nll(view: Guided, z_BL: Tensor, t_B: Tensor, x_BL: Tensor, weight_BL: Tensor, *, condition: bool) -> Tensor:
    h_BLD = view.hidden(z_BL, t_B, None)
    if condition:
        h_BLD = view.hidden(z_BL, t_B, view.carried_estimate(h_BLD, z_BL))
    counted_BL = weight_BL > 0
    nll_N = [
        -view.logits(h).log_softmax(1).gather(1, x[:, None]).squeeze(1)
        for h, x in zip(h_BLD[counted_BL].split(_CHUNK), x_BL[counted_BL].split(_CHUNK), strict=True)
    ]
    zeros_BL = torch.zeros(x_BL.shape, dtype=torch.float64, device=x_BL.device)
    return (zeros_BL.masked_scatter(counted_BL, torch.cat(nll_N).double()) * weight_BL).sum(1)


@torch.no_grad()
def greedy_agrees(
    denoiser: SamplingDenoiser,
    x_BL: Tensor,
    target_BL: Tensor,
    ignored_BL: Tensor,
    *,
    schedule: Schedule,
    mask_id: int,
    carry: bool,
    guidance: float = 1.0,
    prompt_BL: Tensor | None = None,
    block_length: int | None = None,
) -> Tensor:
    """Return a mask (B,) of the rows whose greedy decoding equals `x_BL` at all positions in `target_BL`.

    Greedy decoding reveals one position at a time: the most confident one, with its most probable token (LLaDA).
    Positions in `ignored_BL` stay masked. `carry` conditions each evaluation on the previous one, as samplers do.
    `guidance` and `prompt_BL` are as in `masked_nll`. A row ends at its first different token. A model of blocks of
    `block_length` decodes them from left to right.
    """
    number_L = torch.arange(x_BL.shape[1], device=x_BL.device) // (block_length or x_BL.shape[1])
    last_B = torch.full((len(x_BL),), -1, device=x_BL.device)
    view = Guided(denoiser, mask_id, None, guidance, prompt_BL)
    agrees_B = torch.ones(len(x_BL), dtype=torch.bool, device=x_BL.device)
    rows, estimate = agrees_B.nonzero().squeeze(1), None
    z_BL = x_BL.masked_fill(target_BL | ignored_BL, mask_id)
    count_B = target_BL.sum(1)
    while len(rows):
        open_BL = (z_BL == mask_id) & target_BL[rows]
        block_B = torch.where(open_BL, number_L, len(number_L)).min(1).values
        own_BL = number_L == block_B[:, None]
        open_BL = open_BL & own_BL
        if block_length is not None and estimate is not None:  # null outside of the block, and in a new one
            estimate = estimate.masked_fill(~(own_BL & (block_B == last_B)[:, None])[..., None], 0)
        t_B = schedule.inverse(1 - open_BL.sum(1).double() / count_B[rows]).clamp(max=1)
        own = view.at(rows)
        h_BLD = own.hidden(z_BL, t_B, estimate)
        logits_NV = own.logits(h_BLD[open_BL])
        token_N = logits_NV.argmax(1)
        score_BL = torch.zeros(z_BL.shape, dtype=torch.float64, device=z_BL.device)
        score_BL = score_BL.masked_scatter(open_BL, certainty("confidence", logits_NV, token_N))
        chosen_BL = most_certain(score_BL, open_BL, torch.ones_like(rows))
        z_BL = torch.where(chosen_BL, z_BL.masked_scatter(open_BL, token_N), z_BL)
        wrong_B = (chosen_BL & (z_BL != x_BL[rows])).any(1)
        agrees_B[rows[wrong_B]] = False
        continues_B = ~wrong_B & ((z_BL == mask_id) & target_BL[rows]).any(1)
        if carry:
            estimate = own.carried_estimate(h_BLD, z_BL)[continues_B]
        rows, z_BL, last_B = rows[continues_B], z_BL[continues_B], block_B[continues_B]
    return agrees_B
