"""The linear maps of a block.

Legend: I width of the input, O of the output.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`gate * (W x + b)` (..., O): a gate that all rows share is taken into the weights, which are fewer."""

    def forward(self, x: Tensor, gate_O: Tensor | None = None) -> Tensor:
        if gate_O is None:
            return F.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else gate_O * self.bias
        return F.linear(x, gate_O[:, None] * self.weight, bias)
