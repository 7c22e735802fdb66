"""The linear maps of a block.

Legend: N rows (all dimensions but the last), I width of the input, O of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max


class Linear(nn.Linear):
    """`gate * (W x + b)` (..., O): a gate that all rows share is taken into the weights, which are fewer.

    `float8`, without gradients: operands are rounded to 8 bits (e4m3), each row of either scaled to their range. On a
    GPU (compute capability 8.9 or newer) that is faster, elsewhere the rounding alone is done.
    """

    def forward(self, x: Tensor, gate_O: Tensor | None = None, *, float8: bool = False) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if gate_O is not None:
            weight = gate_O[:, None] * weight
            bias = gate_O * bias if bias is not None else None
        return linear_float8(x, weight, bias) if float8 else F.linear(x, weight, bias)


def linear_float8(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`W x + b` from operands of 8 bits, (..., O) in autocast's dtype; not differentiable."""
    assert not torch.is_grad_enabled()
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        x_NI, x_scale_N1 = _rounded(x.flatten(0, -2))
        weight_OI, weight_scale_O1 = _rounded(weight_OI)
        scales = {"scale_a": x_scale_N1, "scale_b": weight_scale_O1.T}
        if device == "cuda":
            y_NO = torch._scaled_mm(x_NI, weight_OI.T, **scales, out_dtype=dtype, use_fast_accum=True)
        else:
            y_NO = ((x_NI.float() * x_scale_N1) @ (weight_OI.float() * weight_scale_O1).T).to(dtype)
        y_NO = y_NO if bias_O is None else y_NO + bias_O.to(dtype)
        return y_NO.view(*x.shape[:-1], -1)


def _rounded(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8, and what each has to be multiplied by (N, 1), float32."""
    scale_N1 = x_NI.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x_NI.float() / scale_N1).to(_FLOAT8), scale_N1
