"""Selection of distinct rows of a matrix, with a backward pass that copies instead of accumulating.

The backward pass of `x[index]` sorts the index and accumulates, because rows may repeat.

Legend: M rows, N selected rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, at_N: Tensor) -> Tensor:
        ctx.save_for_backward(at_N)
        ctx.rows = len(x_MD)
        return x_MD.index_select(0, at_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ND: Tensor) -> tuple[Tensor, None]:
        (at_N,) = ctx.saved_tensors
        return d_ND.new_zeros(ctx.rows, d_ND.shape[1]).index_copy_(0, at_N, d_ND), None


def take_rows(x_MD: Tensor, at_N: Tensor) -> Tensor:
    """Return `x_MD[at_N]` (N, D) for distinct indices `at_N`. Differentiable once."""
    taken: Tensor = _TakeRows.apply(x_MD, at_N)
    return taken
