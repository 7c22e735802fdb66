"""Estimates of a frozen base: training conditions on another model's evaluation instead of the trained model's.

The base is the trained model with its adapters switched off, or a copy of the base's weights. It has no gradients, no
optimizer state and no averages, and checkpoints do not contain it: a resumed run reads it from the base again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.state import State
from scmdm.models.lora import adapters_off
from scmdm.models.network import Network


class Estimator(Protocol):
    """The part of a denoiser that makes estimates."""

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """See `Denoiser.estimate`."""
        ...


@dataclass(frozen=True)
class EstimatedByBase:
    """A denoiser whose estimates its base makes."""

    denoiser: Denoiser
    base: Estimator

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        """Share no blocks: those of the base have other weights."""
        return None

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """Return the base's estimate; `dropout` is ignored, because with it the estimate would not be the base's."""
        return self.base.estimate(state)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        """See `Denoiser.weighted_nll`."""
        return self.denoiser.weighted_nll(state, x_BL, weight_BL)


@dataclass(frozen=True)
class WithoutAdapters:
    """The base of a model with adapters: the same model, in which they are switched off."""

    denoiser: Denoiser
    model: Network

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """See `Denoiser.estimate`."""
        with adapters_off(self.model):
            return self.denoiser.estimate(state, dropout=dropout)
