"""Linear maps of a transformer block.

Legend: I width of the input, O width of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmdm.ops.fp8 import Multiply, linear_fp8, multiply, multiply_emulated
from scmdm.torch_private import addmm_gelu


class Linear(nn.Linear):
    """Linear map `W x + b`, optionally multiplied by a gate that all positions share.

    Attributes:
        fp8: The product of FP8 matrices, for a map that `multiply_in_fp8` has switched to it.
    """

    fp8: Multiply | None = None

    def forward(self, x: Tensor, gate_O: Tensor | None = None) -> Tensor:
        """Map `x` (..., I) to (..., O).

        A gate (O,) is multiplied into weight and bias, which have fewer elements than the result.
        """
        weight_OI: Tensor = self.weight
        bias_O: Tensor | None = self.bias
        if gate_O is not None:
            weight_OI, bias_O = gate_O[:, None] * weight_OI, None if bias_O is None else gate_O * bias_O
        return F.linear(x, weight_OI, bias_O) if self.fp8 is None else linear_fp8(x, weight_OI, bias_O, self.fp8)


def multiply_in_fp8(blocks: nn.Module, *, emulated: bool) -> None:
    """Switch all `Linear` maps of `blocks` to products in FP8; `emulated` computes them in float32 on any device."""
    for module in blocks.modules():
        if isinstance(module, Linear):
            module.fp8 = multiply_emulated if emulated else multiply


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """Return the GELU (tanh form, arXiv 1606.08415) of `linear(x)`.

    On a GPU, under autocast and without gradients, the matrix product applies the GELU before writing its result,
    for `Linear` itself, not for subclasses, and not in FP8.
    """
    fuses = x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()
    if not fuses or type(linear) is not Linear or linear.bias is None or linear.fp8 is not None:
        return F.gelu(linear(x), approximate="tanh")
    dtype = torch.get_autocast_dtype("cuda")
    y = addmm_gelu(linear.bias.to(dtype), x.flatten(0, -2).to(dtype), linear.weight.to(dtype).T)
    return y.unflatten(0, x.shape[:-1])
