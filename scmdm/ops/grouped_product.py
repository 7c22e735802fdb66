"""Product of consecutive groups of rows with one matrix per group, as the experts of a mixture need it.

On a GPU in bfloat16 one kernel computes all groups, and the host does not wait for their sizes. Elsewhere a loop over
the groups does, which is also the reference for the tests.

Legend: P rows, E groups (experts), I width of the input, O of the output.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from scmdm.torch_private import grouped_mm, has_grouped_mm, is_fake

_KERNEL_ROWS = 8  # the kernel needs groups that begin at multiples of 16 bytes of bfloat16
_CPU_ROWS = 32  # oneDNN compiles a product for each number of rows: few numbers make it three times as fast


def group_alignment(x: Tensor) -> int:
    """Return the number that must divide the sizes of groups in the product of `x`."""
    if _uses_kernel(x):
        return _KERNEL_ROWS
    return _CPU_ROWS if x.device.type == "cpu" and compute_dtype(x) == torch.bfloat16 else 1


def grouped_product(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each group with the transposed matrix of the group, (P, O), in autocast's dtype.

    Args:
        x_PI: Rows, sorted by group. Those after the last group have an undefined result.
        weight_EOI: A matrix per group, which may be empty.
        ends_E: int32; the row at which each group ends.
    """
    if _uses_kernel(x_PI):
        dtype = compute_dtype(x_PI)
        if is_fake(x_PI):  # the same shapes, and gradients of the same sizes
            return F.linear(x_PI.to(dtype), weight_EOI.to(dtype)[0])
        return grouped_mm(x_PI.to(dtype), weight_EOI.to(dtype).transpose(1, 2), ends_E)
    return grouped_product_loop(x_PI, weight_EOI, ends_E)


def grouped_product_loop(x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Compute `grouped_product` with a product per group; rows after the last group are zeros."""
    bounds = [0, *ends_E.tolist(), len(x_PI)]
    # `split` and `unbind` instead of indices: their backward passes make the gradient of the whole once, not per group.
    *groups, rest = x_PI.split([b - a for a, b in pairwise(bounds)])
    parts = [F.linear(rows, weight_OI) for rows, weight_OI in zip(groups, weight_EOI.unbind(), strict=True)]
    return torch.cat([*parts, parts[0].new_zeros(len(rest), weight_EOI.shape[1])] if len(rest) else parts)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of `x` are computed: autocast's, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _uses_kernel(x: Tensor) -> bool:
    return is_fake(x) or (x.device.type == "cuda" and compute_dtype(x) == torch.bfloat16 and has_grouped_mm())
