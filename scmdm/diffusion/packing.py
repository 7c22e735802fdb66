"""Packing: several documents in one sequence that do not attend to each other.

Legend: B batch, L length, C documents of a batch plus one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Documents of a batch; computed once and used by all passes and layers."""

    positions_BL: Tensor  # int64: position of each token in its document
    documents_BL: Tensor  # int64: number of each token's document

    def __getitem__(self, rows_N: Tensor) -> Packing:
        return Packing(self.positions_BL[rows_N], self.documents_BL[rows_N])

    def repeat(self, times: int) -> Packing:
        """Return the packing of the batch repeated along its first dimension."""
        return Packing(self.positions_BL.repeat(times, 1), self.documents_BL.repeat(times, 1))

    @cached_property
    def lengths_BL(self) -> Tensor:
        """Length of each token's document, int64."""
        nth_BL = document_starts(self.documents_BL).long().cumsum(1) - 1  # numbers may have gaps
        lengths_BL = torch.zeros_like(nth_BL).scatter_add(1, nth_BL, torch.ones_like(nth_BL))
        return lengths_BL.gather(1, nth_BL)

    @cached_property
    def allowed_B1LL(self) -> Tensor:
        """Attention mask, bool: query (second to last dimension) and key (last) are of the same document."""
        return (self.documents_BL[:, :, None] == self.documents_BL[:, None, :])[:, None]

    @cached_property
    def bounds_C(self) -> Tensor:
        """Int32 offsets of documents in the flattened batch, and finally B L. Synchronises with the device."""
        firsts = document_starts(self.documents_BL).flatten().nonzero().squeeze(1)
        return torch.cat([firsts, firsts.new_tensor([self.documents_BL.numel()])]).int()


def make_packing(documents_BL: Tensor) -> Packing:
    """Make a packing from the number of each token's document (B, L), which must not decrease along a sequence."""
    starts_BL = document_starts(documents_BL)
    at_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    positions_BL = at_L - torch.where(starts_BL, at_L, 0).cummax(1).values
    return Packing(positions_BL, documents_BL)


def document_starts(documents_BL: Tensor) -> Tensor:
    """Return a mask (B, L) of the first token of every document."""
    before_BL = torch.cat([documents_BL[:, :1] - 1, documents_BL[:, :-1]], 1)
    return documents_BL != before_BL


def pack_padded(lengths_B: Tensor, length: int) -> Packing | None:
    """Pack sequences that are padded to `length`, so that nothing attends to padding; None if none is padded."""
    if bool((lengths_B == length).all()):
        return None
    return make_packing((torch.arange(length, device=lengths_B.device) >= lengths_B[:, None]).long())
