"""From an autoregressive model to a diffusion model: the causal mask is opened over the first steps of a training.

In step k of N, each pair of a query and a later key is visible with probability (k + 1) / N (DiffuLLaMA,
arXiv 2410.17891). All sequences, layers and passes of a step share the pairs. They are keyed on seed and step, so that
a resumed run, on any number of ranks, draws the same.

Legend: L length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.state import State

_ROWS = 256  # drawn at once: a draw takes some 100 bytes


def visible_pairs(length: int, *, seed: int, step: int, steps: int, device: torch.device) -> Tensor | None:
    """Return the pairs (L, L) of a query and a key that it sees in `step`, bool; None: all, after `steps` steps."""
    if step + 1 >= steps:
        return None
    queries = torch.arange(length, device=device)
    visible_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    for rows in queries.split(_ROWS):
        visible_LL[rows] |= keyed_uniform(seed, "causal", step, rows, length) < (step + 1) / steps
    return visible_LL


def causally_annealed(denoiser: Denoiser, tokens_BL: Tensor, *, seed: int, step: int, steps: int) -> Denoiser:
    """Return the denoiser for sequences of up to this length in `step`, on the device of `tokens_BL`."""
    visible_LL = visible_pairs(tokens_BL.shape[1], seed=seed, step=step, steps=steps, device=tokens_BL.device)
    return denoiser if visible_LL is None else CausalDenoiser(denoiser, visible_LL)


@dataclass(frozen=True)
class CausalDenoiser:
    """A denoiser in which each query sees some keys only."""

    denoiser: Denoiser
    visible_LL: Tensor

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        """See `Denoiser.lower`."""
        return self.denoiser.lower(self._masked(state), dropout=dropout)

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """See `Denoiser.estimate`."""
        return self.denoiser.estimate(self._masked(state), dropout=dropout)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        """See `Denoiser.weighted_nll`."""
        return self.denoiser.weighted_nll(self._masked(state), x_BL, weight_BL)

    def _masked(self, state: State) -> State:
        length = state.z_BL.shape[1]
        return replace(state, visible_LL=self.visible_LL[:length, :length])
