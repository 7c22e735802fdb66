"""Monte Carlo estimate of the NELBO on held-out sequences.

Legend: B batch, L length, N sequences.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.diffusion.objective import Denoiser, self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch, stratified_times
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import Sequences

_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Nelbo:
    """NELBO in nats per valid token; its exponential is an upper bound of the perplexity."""

    mean: float
    stderr: float  # over sequences; an overestimate, because times are stratified
    tokens: int
    sequences: int

    @property
    def perplexity(self) -> float:
        """Upper bound of the perplexity per token."""
        return exp_or_inf(self.mean)


def exp_or_inf(value: float) -> float:
    """Return e to the power of `value`, infinity where that is beyond the largest float."""
    return math.inf if value > _LARGEST_EXPONENT else math.exp(value)


@torch.no_grad()
def nelbo_terms(
    denoiser: Denoiser,
    batches: Iterable[Sequences],
    schedule: Schedule,
    *,
    mask_id: int,
    seed: int,
    t_min: float,
    strata: Sequence[Tensor] | None = None,
    draws: int = 1,
    condition: bool = False,
    passes: int = 1,
    block_length: int | None = None,
) -> Tensor:
    """Return the NELBO in nats and the valid tokens of each sequence, (N, 2) float64 on the CPU; see `nelbo_of`.

    There are `draws` times per sequence. They are stratified over each of `strata`, tensors of sample ids that include
    the sequences of `batches`: the terms then do not depend on how the sequences are divided into batches, or over
    ranks. Without `strata` each batch is one.

    `condition` conditions on the estimate of `passes` passes. The result is still a bound on the likelihood, because
    the estimate is a function of `z_t`. The same seed gives the same times and masks, so that two models, or both modes
    of one model, are compared on the same noise. With `block_length`, the NELBO is the sum of those of the blocks
    (`scmdm.diffusion.blocks`).
    """
    shared = None if strata is None else _Times(seed, t_min, strata, draws)
    terms: list[Tensor] = []
    for batch in batches:
        times = _Times(seed, t_min, [batch.ids.cpu()], draws) if shared is None else shared
        share_B = torch.zeros(len(batch), dtype=torch.float64, device=batch.ids.device)
        for draw in range(draws):
            noised = noise_batch(
                batch,
                times.of(batch.ids, draw),
                schedule=schedule,
                mask_id=mask_id,
                seed=seed,
                step=draw,
                rate=1.0 if condition else 0.0,
                block_length=block_length,
                t_min=t_min,
            )
            output = self_conditioned_nelbo(
                denoiser, noised, schedule, condition=condition, passes=passes, share_lower=True
            )
            share_B += output.weighted_nll_B / draws
        terms.append(torch.stack([share_B, batch.valid.sum(1).double()], 1).cpu())
    return torch.cat(terms)


class _Times:
    """Times of sequences by id, stratified within each of `strata`, which share no id."""

    def __init__(self, seed: int, t_min: float, strata: Sequence[Tensor], draws: int) -> None:
        times_DN = [torch.cat([stratified_times(seed, draw, ids, t_min) for ids in strata]) for draw in range(draws)]
        self._ids_N, order_N = torch.cat(list(strata)).sort()
        self._times_DN = torch.stack(times_DN)[:, order_N]

    def of(self, ids_B: Tensor, draw: int) -> Tensor:
        """Return the times (B,), float64, of a draw."""
        at_B = torch.searchsorted(self._ids_N, ids_B.cpu())
        return self._times_DN[draw, at_B].to(ids_B.device)


def nelbo_of(terms_N2: Tensor) -> Nelbo:
    """Return the mean NELBO per token and its standard error (delta method for a ratio of sums) from `nelbo_terms`."""
    sums_N, counts_N = terms_N2.unbind(1)
    n, mean = len(sums_N), float(sums_N.sum() / counts_N.sum())
    residual_N = sums_N - mean * counts_N
    stderr = float(residual_N.square().sum().sqrt() / counts_N.sum()) if n > 1 else float("nan")
    return Nelbo(mean, stderr, int(counts_N.sum()), n)
