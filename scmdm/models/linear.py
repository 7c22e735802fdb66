"""Linear maps of a transformer block.

Legend: I width of the input, O width of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmdm.torch_private import addmm_gelu


class Linear(nn.Linear):
    """Linear map `W x + b`, optionally multiplied by a gate that all positions share."""

    def forward(self, x: Tensor, gate_O: Tensor | None = None) -> Tensor:
        """Map `x` (..., I) to (..., O).

        A gate (O,) is multiplied into weight and bias, which have fewer elements than the result.
        """
        if gate_O is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, gate_O[:, None] * self.weight, None if self.bias is None else gate_O * self.bias)


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """Return the GELU (tanh form, arXiv 1606.08415) of `linear(x)`.

    On a GPU, under autocast and without gradients, the matrix product applies the GELU before writing its result,
    for `Linear` itself, not for subclasses.
    """
    fuses = x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()
    if not fuses or type(linear) is not Linear or linear.bias is None:
        return F.gelu(linear(x), approximate="tanh")
    dtype = torch.get_autocast_dtype("cuda")
    y = addmm_gelu(linear.bias.to(dtype), x.flatten(0, -2).to(dtype), linear.weight.to(dtype).T)
    return y.unflatten(0, x.shape[:-1])
