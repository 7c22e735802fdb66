"""Clean sequences, and noised ones as a denoiser sees them, each with what belongs to it.

Legend: B batch, L length, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.packing import Packing

NO_LABEL = -1


@dataclass(frozen=True)
class Sequences:
    """Rows belong together."""

    tokens: Tensor  # (B, L) int64
    valid: Tensor  # (B, L) bool: may be masked, and counts in the likelihood
    ids: Tensor  # (B,) int64: what all noise is keyed on
    documents: Tensor | None = None  # (B, L) int64: the number of each token's document, of packed samples
    labels: Tensor | None = None  # (B,) int64: classes, of a model that knows them

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Sequences:
        more = {name: column[rows] for name in ("documents", "labels") if (column := getattr(self, name)) is not None}
        return Sequences(self.tokens[rows], self.valid[rows], self.ids[rows], **more)


@dataclass(frozen=True)
class State:
    """All that one denoiser evaluation sees."""

    z_BL: Tensor  # int64, noised tokens
    t_B: Tensor  # float64, their times
    estimate_BLD: Tensor | None = None  # expected embedding of the clean tokens; None: the null estimate
    packing: Packing | None = None  # several documents in each row
    labels_B: Tensor | None = None  # int64, class of each sequence or NO_LABEL, of a model that knows labels


def drop_labels(labels_B: Tensor, ids_B: Tensor, *, rate: float, seed: int, step: int) -> Tensor:
    """Labels of which each is replaced by NO_LABEL with probability `rate`, so that the model also learns what
    guidance compares with (classifier-free guidance, arXiv 2207.12598, algorithm 1)."""
    dropped_B = keyed_uniform(seed, "label", step, ids_B, 1)[:, 0] < rate
    return torch.where(dropped_B, NO_LABEL, labels_B)


def true_positions(mask_BL: Tensor) -> Tensor:
    """Where a mask is true, as indices (N,) into its elements in row-major order."""
    return mask_BL.flatten().nonzero().squeeze(1)
