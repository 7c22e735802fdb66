"""Several documents in one sequence that do not see each other.

Legend: B batch, L length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Made once per batch, used by every pass over it and every layer of them."""

    positions_BL: Tensor  # int64: each token's place in its document
    allowed_B1LL: Tensor  # bool: which token (last) a token (before it) sees: those of its own document


def make_packing(documents_BL: Tensor) -> Packing:
    """From the number of each token's document (B, L), which never falls along a sequence."""
    starts_BL = document_starts(documents_BL)
    at_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    positions_BL = at_L - torch.where(starts_BL, at_L, 0).cummax(1).values
    return Packing(positions_BL, (documents_BL[:, :, None] == documents_BL[:, None, :])[:, None])


def document_starts(documents_BL: Tensor) -> Tensor:
    """Bool (B, L): the first token of every document."""
    before_BL = torch.cat([documents_BL[:, :1] - 1, documents_BL[:, :-1]], 1)
    return documents_BL != before_BL
