"""Several documents in one sequence that do not see each other.

Legend: B batch, L length, C documents of a batch and one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Made once per batch, used by every pass over it and every layer of them."""

    positions_BL: Tensor  # int64: each token's place in its document
    documents_BL: Tensor  # int64: the number of each token's document

    @cached_property
    def allowed_B1LL(self) -> Tensor:
        """Bool: which token (last) a token (before it) sees: those of its own document."""
        return (self.documents_BL[:, :, None] == self.documents_BL[:, None, :])[:, None]

    @cached_property
    def bounds_C(self) -> Tensor:
        """Int32: the first token of each document among the B L of the batch, and at last B L. Waits for the device,
        which alone knows how many there are."""
        firsts = document_starts(self.documents_BL).flatten().nonzero().squeeze(1)
        return torch.cat([firsts, firsts.new_tensor([self.documents_BL.numel()])]).int()


def make_packing(documents_BL: Tensor) -> Packing:
    """From the number of each token's document (B, L), which never falls along a sequence."""
    starts_BL = document_starts(documents_BL)
    at_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    positions_BL = at_L - torch.where(starts_BL, at_L, 0).cummax(1).values
    return Packing(positions_BL, documents_BL)


def document_starts(documents_BL: Tensor) -> Tensor:
    """Bool (B, L): the first token of every document."""
    before_BL = torch.cat([documents_BL[:, :1] - 1, documents_BL[:, :-1]], 1)
    return documents_BL != before_BL
