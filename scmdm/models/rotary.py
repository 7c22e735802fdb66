"""Rotary position embedding (arXiv 2104.09864) in the half-split layout, and attention with it.

Legend: B batch, L length, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from scmdm.models.attention import NO_MASKS, Masks, attend, attend_slices


@dataclass(frozen=True)
class RotaryScaling:
    """Change of the angles for contexts longer than those of the pretraining.

    `linear` divides all angles by `factor` (arXiv 2306.15595). `llama3` divides those with less than `low` turns in
    `length` positions, leaves those with more than `high`, and interpolates in between (LLaMA 3.1, arXiv 2407.21783).
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    length: int = 8192  # of the pretraining

    def apply(self, frequencies: Tensor) -> Tensor:
        """Return the scaled angles per position."""
        scaled = frequencies / self.factor
        if self.kind == "linear":
            return scaled
        turns = self.length * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * scaled + kept * frequencies


class Rotary(nn.Module):
    """Table (L, K/2, 2) of rotary embeddings: cosine and sine of the angle of each pair of channels."""

    def __init__(self, head_width: int, base: float = 10_000.0, scaling: RotaryScaling | None = None) -> None:
        super().__init__()
        self.head_width, self.base, self.scaling = head_width, base, scaling
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.empty(head_width // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the buffer. Call this also after `to_empty` of a model on the meta device."""
        with torch.no_grad():
            self.inv_freq.copy_(self.frequencies())

    def frequencies(self) -> Tensor:
        """Return the angles per position (K/2,), in radians, of the pairs of channels, on the CPU."""
        frequencies = inverse_frequencies(self.head_width, self.base)
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)

    def forward(self, length: int) -> Tensor:
        """Return the rows of the first `length` positions."""
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq.float())
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


def inverse_frequencies(head_width: int, base: float = 10_000.0) -> Tensor:
    """Return the unscaled angles per position (K/2,), in radians, of the pairs of channels of a head."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width
    return 1.0 / base**exponent


class _ComplexRotation(torch.autograd.Function):
    """Rotation by complex multiplication, for CPUs. Channels of a pair are adjacent in the result."""

    @staticmethod
    def forward(ctx: Any, x_BLHK: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        turned = torch.complex(*x_BLHK.float().chunk(2, dim=-1)).mul_(torch.view_as_complex(table))
        return torch.view_as_real(turned).flatten(-2).to(x_BLHK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BLHK: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        turned = d_BLHK.to(torch.float32, copy=True, memory_format=torch.contiguous_format).unflatten(-1, (-1, 2))
        torch.view_as_complex(turned).mul_(torch.view_as_complex(table).conj())
        d_x = torch.empty_like(d_BLHK, memory_format=torch.contiguous_format)
        d_x.unflatten(-1, (2, -1)).copy_(turned.transpose(-1, -2))
        return d_x, None


def rotate(rotary: Tensor, *tensors_BLHK: Tensor) -> tuple[Tensor, ...]:
    """Rotate each pair of channels (k, k + K/2) by the angle of its position.

    The table is (L, K/2, 2), or (B, L, K/2, 2) for packed samples. On a CPU, the result is differentiable once and has
    pair k at channels (2 k, 2 k + 1): attention does not depend on an order that queries and keys share.
    """
    like, table = tensors_BLHK[0], rotary.unsqueeze(-3)
    if like.device.type == "cpu" and not torch.compiler.is_compiling():
        return tuple(_ComplexRotation.apply(x, table) for x in tensors_BLHK)
    cos, sin = table.to(like.dtype).unbind(-1)
    cosines, sines = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    halves = (x.chunk(2, dim=-1) for x in tensors_BLHK)
    swapped = (torch.cat([second, first], dim=-1) for first, second in halves)
    return tuple(x * cosines + y * sines for x, y in zip(tensors_BLHK, swapped, strict=True))


def attend_rotated(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    rotary: Tensor,
    backend: str,
    masks: Masks = NO_MASKS,
    context: DeviceMesh | None = None,
    *,
    repeated: bool = False,
) -> Tensor:
    """Compute attention (B, L, H, K) with rotary embeddings; see `attend`.

    With `context` each rank holds a slice of the sequences (`attend_slices`). `masks`: see `masks_of`; `repeated`: see
    `choose_backend`.
    """
    (q, k), v = rotate(rotary, q_BLHK, k_BLGK), v_BLGK
    if masks.cache is not None:
        k, v = masks.cache.extend(k, v)
    if context is None:
        return attend(q, k, v, backend, masks.allowed, masks.bounds_C, repeated=repeated)
    return attend_slices(q, k, v, backend, context, repeated=repeated)
