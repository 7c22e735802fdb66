"""The linear maps of a block.

Legend: I width of the input, O of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`W x + b` (..., O)."""

    def forward(self, x: Tensor, gate_O: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        """`gate_O` is multiplied with the result; one that all rows share is taken into the weights, which are fewer.
        `gelu` (tanh form): of the result, in autocast's dtype and by the product's own kernel; not differentiable."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if gate_O is not None:
            weight = gate_O[:, None] * weight
            bias = None if bias is None else gate_O * bias
        return _gelu_of_product(x, weight, bias) if gelu else F.linear(x, weight, bias)


def _gelu_of_product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    assert bias_O is not None
    dtype = torch.get_autocast_dtype(x.device.type)
    rows, weight_IO = x.flatten(0, -2).to(dtype), weight_OI.to(dtype).T
    y: Tensor = torch._addmm_activation(bias_O.to(dtype), rows, weight_IO, use_gelu=True)
    return y.unflatten(0, x.shape[:-1])
