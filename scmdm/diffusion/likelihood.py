"""Monte Carlo estimate of the NELBO on held-out sequences.

Legend: B batch, L length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.diffusion.objective import Denoiser, self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch, stratified_times
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import Sequences


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
        return math.exp(self.mean)


@torch.no_grad()
def estimate_nelbo(
    denoiser: Denoiser,
    batches: Iterable[Sequences],
    schedule: Schedule,
    *,
    mask_id: int,
    seed: int,
    t_min: float,
    draws: int = 1,
    condition: bool = False,
    passes: int = 1,
) -> Nelbo:
    """Estimate the mean NELBO over batches, with `draws` times per sequence.

    `condition` conditions on the estimate of `passes` passes. The result is still a bound on the likelihood, because
    the estimate is a function of `z_t`. The same seed gives the same times and masks, so that two models, or both modes
    of one model, are compared on the same noise.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for batch in batches:
        shares = torch.zeros(len(batch), dtype=torch.float64, device=batch.ids.device)
        for draw in range(draws):
            noised = noise_batch(
                batch,
                stratified_times(seed, draw, batch.ids, t_min),
                schedule=schedule,
                mask_id=mask_id,
                seed=seed,
                step=draw,
                rate=1.0 if condition else 0.0,
                noisier_state=False,
            )
            output = self_conditioned_nelbo(denoiser, noised, schedule, condition=condition, passes=passes)
            shares += output.weighted_nll_B / draws
        sums.append(shares.cpu())
        counts.append(batch.valid.sum(1).double().cpu())
    return _ratio(torch.cat(sums), torch.cat(counts))


def _ratio(sums: Tensor, counts: Tensor) -> Nelbo:
    """Return the mean per token and its standard error (delta method for a ratio of sums)."""
    n, mean = len(sums), float(sums.sum() / counts.sum())
    residual = sums - mean * counts
    stderr = float(residual.square().sum().sqrt() / counts.sum()) if n > 1 else float("nan")
    return Nelbo(mean, stderr, int(counts.sum()), n)
