"""Logits as they look along the principal axes of the output head: SVD-softmax (Shim et al., NIPS 2017).

Enough to see which tokens may be the most probable, for a fraction of the products.

Legend: D width, V vocabulary, R axes, S rows of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 2048
_ITERATIONS = 3


@dataclass(frozen=True)
class Preview:
    """A head's weight along its axes."""

    axes_DR: Tensor
    weight_VR: Tensor

    @staticmethod
    def of(weight_VD: Tensor, rank: int) -> Preview:
        """The axes of a sample of the weight's rows about their mean, which adds the same to all logits of a position;
        by orthogonal iteration."""
        rows_SD = weight_VD[:: -(-len(weight_VD) // _SAMPLE)].float()
        rows_SD = rows_SD - rows_SD.mean(0)
        covariance_DD = rows_SD.T @ rows_SD
        axes_DR = torch.linalg.qr(covariance_DD[:, :rank]).Q
        for _ in range(_ITERATIONS):
            axes_DR = torch.linalg.qr(covariance_DD @ axes_DR).Q
        axes_DR = axes_DR.to(weight_VD.dtype)
        return Preview(axes_DR, weight_VD @ axes_DR)

    @staticmethod
    def where_it_pays(weight_VD: Tensor, rank: int | None, positions: int) -> Preview | None:
        """None where its two products, of the weight and of so many positions, are no less work than all logits."""
        width = weight_VD.shape[1]
        return None if rank is None or (positions + width) * rank >= positions * width else Preview.of(weight_VD, rank)
