"""Linear maps whose matrix products multiply FP8 numbers (arXiv 2209.05433), scaled row by row.

Operands are quantized dynamically: each row is scaled so that its largest number is the largest of the dtype. Scales
run along the product's outer dimensions, so that a result depends on its own row and column alone, not on the other
sequences of a batch. Values and weights are e4m3, gradients of results are e5m2, which has a wider range. All three
products of a linear map are of the form `A B^T`:

- forward: `X W^T`, by position and output channel,
- gradient of the input: `G (W^T)^T`, by position and input channel,
- gradient of the weight: `G^T (X^T)^T`, by output and input channel; the forward pass keeps `X^T` in FP8.

Legend: N positions, I width of the input, O of the output, M and P rows of two operands, K their common width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmdm.config.model import FP8_MULTIPLE
from scmdm.ops.grouped_product import compute_dtype
from scmdm.torch_private import scaled_mm

_VALUES, _GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_LEAST = 2.0**-100  # a row whose numbers are all smaller is scaled as if this were the largest; scales stay normal
_CAPABILITY = (8, 9)


class Fp8Rows(NamedTuple):
    """A matrix in FP8: the number at (m, k) is `values_MK[m, k] * scale_M1[m]`."""

    values_MK: Tensor
    scale_M1: Tensor  # float32


Multiply: TypeAlias = Callable[[Fp8Rows, Fp8Rows, torch.dtype], Tensor]


def quantize_rows(x_MK: Tensor, dtype: torch.dtype) -> Fp8Rows:
    """Convert a matrix to FP8 with a scale per row."""
    largest = torch.finfo(dtype).max
    scale_M1 = x_MK.abs().amax(1, keepdim=True).float().clamp(min=_LEAST) / largest
    scaled_MK = (x_MK.float() / scale_M1).clamp(-largest, largest)
    return Fp8Rows(scaled_MK.to(dtype), scale_M1)


def multiply(a_MK: Fp8Rows, b_PK: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """Return `A B^T` (M, P) by the GPU's FP8 kernel, which needs K and P to be multiples of 16 and bfloat16 results."""
    return scaled_mm(a_MK.values_MK, b_PK.values_MK.t(), a_MK.scale_M1, b_PK.scale_M1.t(), dtype)


def multiply_emulated(a_MK: Fp8Rows, b_PK: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """Return what `multiply` returns, computed in float32 on any device."""
    with torch.autocast(a_MK.values_MK.device.type, enabled=False):
        product_MP = a_MK.values_MK.float() @ b_PK.values_MK.float().t()
        return (product_MP * a_MK.scale_M1 * b_PK.scale_M1.t()).to(dtype)


def linear_fp8(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, multiplied_by: Multiply) -> Tensor:
    """Return `W x + b` (..., O) of `x` (..., I) in the dtype of autocast, or else of `x`; differentiable once."""
    dtype = compute_dtype(x)
    # Determined here: inside an autograd function gradients are off, and `needs_input_grad` ignores `no_grad`.
    train_weight = torch.is_grad_enabled() and weight_OI.requires_grad
    y_NO = _LinearFp8.apply(x.flatten(0, -2).to(dtype), weight_OI, dtype, multiplied_by, train_weight)
    if bias_O is not None:
        y_NO = y_NO + bias_O.to(dtype)
    return y_NO.unflatten(0, x.shape[:-1])


class _LinearFp8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, dtype: torch.dtype, multiplied_by: Multiply, train_weight: bool
    ) -> Tensor:
        ctx.dtype, ctx.multiplied_by, ctx.train_weight = dtype, multiplied_by, train_weight
        kept = quantize_rows(_padded(x_NI.t()), _VALUES) if train_weight else ()
        ctx.save_for_backward(weight_OI, *kept)
        return multiplied_by(quantize_rows(x_NI, _VALUES), quantize_rows(weight_OI, _VALUES), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_NO: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, *kept = ctx.saved_tensors
        d_x_NI = d_weight_OI = None
        if ctx.needs_input_grad[0]:
            columns = quantize_rows(weight_OI.t(), _VALUES)
            d_x_NI = ctx.multiplied_by(quantize_rows(d_NO, _GRADIENTS), columns, ctx.dtype)
        if ctx.train_weight:
            gradient = quantize_rows(_padded(d_NO.t()), _GRADIENTS)
            d_weight_OI = ctx.multiplied_by(gradient, Fp8Rows(*kept), ctx.dtype).to(weight_OI.dtype)
        return d_x_NI, d_weight_OI, None, None, None


def _padded(x_MN: Tensor) -> Tensor:
    """Append zeros to the rows up to the next width that the kernels take."""
    return F.pad(x_MN, (0, -x_MN.shape[1] % FP8_MULTIPLE))


def fp8_unusable_because(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why products in FP8 cannot run for this device and dtype of compute; None if they can."""
    if device.type != "cuda":
        return "FP8 needs a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"FP8 needs compute capability 8.9 or newer, not {capability[0]}.{capability[1]}"
    return None if dtype == torch.bfloat16 else f"FP8 needs precision=bfloat16, not {str(dtype).removeprefix('torch.')}"
