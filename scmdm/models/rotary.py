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

from scmdm.diffusion.packing import Packing
from scmdm.models.attention import NO_MASKS, Masks, attend, attend_slices


@dataclass(frozen=True)
class RotaryScaling:
    """Change of the angles for contexts longer than those of the pretraining.

    - `linear` divides all angles by `factor` (arXiv 2306.15595).
    - `dynamic` raises the base for sequences of more than `length` positions (NTK-aware, as in `transformers`).
    - `llama3` divides angles with less than `low` turns in `length` positions, leaves those with more than `high`, and
      interpolates in between (LLaMA 3.1, arXiv 2407.21783).
    - `yarn` does so along the index of the angles, from whole indices if `truncate`, and multiplies cosine and sine by
      `amplitude` (arXiv 2309.00071).
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    length: int = 8192  # of the pretraining
    amplitude: float = 1.0
    truncate: bool = True

    def apply(self, frequencies: Tensor, base: float) -> Tensor:
        """Return the angles per position that scaling makes of `frequencies` (K/2,), whatever the sequences' length."""
        if self.kind == "dynamic":
            return frequencies
        divided = frequencies / self.factor
        if self.kind == "linear":
            return divided
        kept = self._kept_by_index(frequencies, base) if self.kind == "yarn" else self._kept_by_turns(frequencies)
        return (1 - kept) * divided + kept * frequencies

    def _kept_by_turns(self, frequencies: Tensor) -> Tensor:
        turns = self.length * frequencies / (2 * math.pi)
        return ((turns - self.low) / (self.high - self.low)).clamp(0, 1)

    def _kept_by_index(self, frequencies: Tensor, base: float) -> Tensor:
        pairs, index = len(frequencies), torch.arange(len(frequencies), device=frequencies.device)
        first, last = (pairs * math.log(self.length / (2 * math.pi * n), base) for n in (self.high, self.low))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        width = last - first or 0.001  # as in transformers
        return 1 - ((index - first) / width).clamp(0, 1)

    def growth(self, lengths: Tensor, head_width: int) -> Tensor:
        """Return the factor of the base for sequences of these lengths; it differs from 1 for `dynamic` alone."""
        beyond = self.factor * (lengths / self.length - 1).clamp(min=0)
        return (1 + beyond) ** (head_width / (head_width - 2))


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
        return frequencies if self.scaling is None else self.scaling.apply(frequencies, self.base)

    def forward(self, length: int, packing: Packing | None = None) -> Tensor:
        """Return the rows of the first `length` positions; with `packing`, those (B, L, K/2, 2) of its positions."""
        positions = torch.arange(length, device=self.inv_freq.device).float()
        if self.scaling is not None and self.scaling.kind == "dynamic" and length > self.scaling.length:
            return self._grown(positions, packing)
        table = self._table(torch.outer(positions, self.inv_freq.float()))
        return table if packing is None else table[packing.positions_BL]

    def _grown(self, positions: Tensor, packing: Packing | None) -> Tensor:
        """Return the rows where the angles depend on the length, with `packing` on that of each document."""
        assert self.scaling is not None
        lengths = positions.new_tensor(len(positions))
        if packing is not None:
            positions, lengths = packing.positions_BL.float(), packing.lengths_BL.float()
        exponent = torch.arange(0, self.head_width, 2, device=positions.device) / self.head_width
        bases = self.base * self.scaling.growth(lengths.double(), self.head_width)
        return self._table(positions[..., None] / (bases[..., None] ** exponent).float())

    def _table(self, angles: Tensor) -> Tensor:
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return table if self.scaling is None else self.scaling.amplitude * table


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

    The table is (L, K/2, 2), or (B, L, K/2, 2) for packed samples. Channels for which it has no angles, the last of a
    head, stay as they are. On a CPU, the result is differentiable once and has pair k at channels (2 k, 2 k + 1):
    attention does not depend on an order that queries and keys share.
    """
    like, table = tensors_BLHK[0], rotary.unsqueeze(-3)
    if (width := 2 * rotary.shape[-2]) < like.shape[-1]:
        turned = rotate(rotary, *(x[..., :width] for x in tensors_BLHK))
        return tuple(torch.cat([r, x[..., width:]], dim=-1) for r, x in zip(turned, tensors_BLHK, strict=True))
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
