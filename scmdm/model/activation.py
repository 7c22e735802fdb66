"""GELU in its tanh form, faster where nothing has to be kept for a backward pass: in the estimate's pass and in
sampling."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmdm.model.linear import Linear

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR
_PART = 1 << 18  # numbers looked up at once: their indices stay in a core's cache


class Gelu(nn.Module):
    """`x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`, any shape (arXiv 1606.08415, section 2).

    torch's CPU kernel spends as long on the tanh as the product before it takes. Its logistic function s is three times
    as fast, and `(1 + tanh(a)) / 2 = s(2 a)`. Of the 65,536 numbers of bfloat16 all values are in a table.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.bfloat16):
            return F.gelu(x, approximate="tanh")
        if x.dtype == torch.float32 or torch.compiler.is_compiling():
            return _logistic(x.float()).to(x.dtype)
        return _looked_up(x)


@functools.cache
def _table() -> Tensor:
    """GELU (65,536,) of every bfloat16 number, by its bits."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    return F.gelu(bits.view(torch.bfloat16), approximate="tanh")


def _looked_up(x: Tensor) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    # By parts: new pages for the indices of all numbers would take longer than looking them up.
    bits = torch.empty(min(x.numel(), _PART), dtype=torch.int32)
    for part, into in zip(x.flatten().split(_PART), result.view(-1).split(_PART), strict=True):
        own = bits[: len(part)].copy_(part.view(torch.int16)).bitwise_and_(0xFFFF)
        torch.index_select(_table(), 0, own, out=into)
    return result


def _logistic(x: Tensor) -> Tensor:
    return (x * x).mul_(_CUBIC).add_(_LINEAR).mul_(x).sigmoid_().mul_(x)


def gelu_of(linear: nn.Module, gelu: nn.Module, x: Tensor) -> Tensor:
    """`gelu(linear(x))`. On a GPU, without gradients, the product's kernel makes it before it writes its result."""
    fused = x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()
    result: Tensor = linear(x, gelu=True) if fused and type(linear) is Linear else gelu(linear(x))
    return result
