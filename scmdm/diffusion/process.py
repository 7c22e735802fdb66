"""The forward (absorbing) process and its random draws.

Legend: B batch, L length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.diffusion.blocks import spread_times, spread_uniforms
from scmdm.diffusion.noise import keyed_permutation, keyed_uniform
from scmdm.diffusion.packing import Packing, make_packing
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import Sequences


def stratified_times(seed: int, step: int, ids_N: Tensor, t_min: float) -> Tensor:
    """Return times (N,), float64, `t_i = t_min + (1 - t_min) ((u + rank_i / N) mod 1)`.

    `ids_N` are all samples of the global batch. There is one `u` per step, and the ranks are a keyed permutation of the
    ids: a sample's time does not depend on how the batch is split. Each time is uniform on [t_min, 1]; together they
    cover it evenly, which lowers the variance of the loss (antithetic times, MDLM section 3.5; VDM appendix I).
    """
    u = keyed_uniform(seed, "time", step, torch.zeros(1, dtype=torch.int64, device=ids_N.device), 1)[0, 0]
    rank = keyed_permutation(seed, "time-order", step, ids_N)
    return t_min + (1 - t_min) * ((u + rank.double() / len(ids_N)) % 1.0)


@dataclass(frozen=True)
class NoisedBatch:
    """A noised micro-batch; all tensors have the same rows."""

    x: Tensor  # (B, L) int64, clean tokens
    z: Tensor  # (B, L) int64, noised tokens at `t`
    t: Tensor  # (B,) float64
    valid: Tensor  # (B, L) bool: counts in the likelihood
    conditioned: Tensor  # (B,) bool: pass 2 is conditioned on the estimate
    packing: Packing | None = None  # several documents in each row
    labels: Tensor | None = None  # (B,) int64, labels, some replaced by NO_LABEL
    share: Tensor | None = None  # (B,) float32: factor of each sample's loss; None: 1
    block_t: Tensor | None = None  # (B, L) float64, time of each position's block; None: `t`, no model of blocks
    rollout: tuple[tuple[Tensor, Tensor], ...] = ()  # earlier states (B, L) with their times (B,), the noisiest first;
    # each one's masks include those of the next
    perturbation: Tensor | None = None  # (B, L, D) float32, noise of what is carried, see `State.perturbation_BLD`

    @property
    def clean(self) -> Tensor | None:
        """Tokens of the clean copy that a model of blocks sees; None for other models."""
        return None if self.block_t is None else self.x


def mask_tokens(x_BL: Tensor, u_BL: Tensor, alpha: Tensor, maskable_BL: Tensor, mask_id: int) -> Tensor:
    """Draw `z_t ~ q(z_t | x)`: mask the maskable tokens whose uniform is below `1 - alpha_t`, (B, 1) or (B, L).

    With the same uniforms, the masks at a larger time include those at a smaller one.
    """
    masked = (u_BL < 1 - alpha) & maskable_BL
    return x_BL.masked_fill(masked, mask_id)


def rollout_times(t: Tensor, u: Tensor, steps: int, span: float) -> list[Tensor]:
    """Return the times of a rollout, the noisiest first, from uniforms `u` that broadcast with the times `t`.

    The first is uniform between t and min(1, t + span), the others lie at equal distances between it and t.
    """
    reach = (1 - t).clamp(max=span)
    return [t + reach * (k / steps) * u for k in range(steps, 0, -1)]


def noise_batch(
    sequences: Sequences,
    t_B: Tensor,
    *,
    schedule: Schedule,
    mask_id: int,
    seed: int,
    step: int,
    rate: float,
    rollout_steps: int = 0,
    rollout_span: float = 1.0,
    block_length: int | None = None,
    t_min: float = 0.0,
) -> NoisedBatch:
    """Noise a micro-batch with draws keyed on (seed, step, sample id).

    `rate` is the probability that the second pass of a sample is conditioned. With `rollout_steps` there are that
    many noisier states, at `rollout_times`. The uniforms of the masks are the same, hence noisier states have more
    masks. Tokens that are neither valid nor maskable (ignored padding, a prompt) are never masked.

    For a model of blocks of `block_length`, each block has its own times, which follow from `t_B` (`spread_times`), the
    sequences' stratified times on [t_min, 1].
    """
    x_BL, valid_BL, ids_B = sequences.tokens, sequences.valid, sequences.ids
    maskable_BL = valid_BL if sequences.maskable is None else sequences.maskable
    packing = None if sequences.documents is None else make_packing(sequences.documents)
    u_BL = keyed_uniform(seed, "mask", step, ids_B, x_BL.shape[1])
    t, block_t = t_B[:, None], None
    if block_length is not None:
        own = {"seed": seed, "step": step}
        t = block_t = spread_times(t_B, ids_B, maskable_BL, block_length, packing, t_min=t_min, **own)

    def masked_at(time: Tensor) -> Tensor:
        return mask_tokens(x_BL, u_BL, schedule.alpha(time), maskable_BL, mask_id)

    earlier: tuple[tuple[Tensor, Tensor], ...] = ()
    if rollout_steps:
        v_B1 = v = keyed_uniform(seed, "estimate-time", step, ids_B, 1)
        if block_length is not None:
            v = spread_uniforms("estimate-time", ids_B, block_length, packing, x_BL.shape[1], seed=seed, step=step)
        states = map(masked_at, rollout_times(t, v, rollout_steps, rollout_span))
        earlier = tuple(zip(states, rollout_times(t_B, v_B1[:, 0], rollout_steps, rollout_span), strict=True))
    conditioned_B = keyed_uniform(seed, "condition", step, ids_B, 1)[:, 0] < rate
    return NoisedBatch(
        x_BL,
        masked_at(t),
        t_B,
        valid_BL,
        conditioned_B,
        packing,
        sequences.labels,
        block_t=block_t,
        rollout=earlier,
    )


def reveal_mask(z_BL: Tensor, u_BL: Tensor, probability_B: Tensor, mask_id: int) -> Tensor:
    """Return a mask (B, L) of the masked positions that are revealed in this step, according to uniforms."""
    return (z_BL == mask_id) & (u_BL < probability_B[:, None])


def uniform_position(masked_BL: Tensor, u_B: Tensor) -> Tensor:
    """Return a mask (B, L) of one masked position per row, chosen uniformly by `u_B`; none in a row without masks."""
    count_B = masked_BL.sum(1)
    chosen_B = torch.minimum((u_B * count_B).long(), (count_B - 1).clamp(min=0))
    return masked_BL & ((masked_BL.cumsum(1) - 1) == chosen_B[:, None])
