"""Rotary positions (arXiv 2104.09864), half-split layout, and attention between rotated queries and keys.

Legend: B batch, L length, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.model.attention import NO_MASKS, Masks, attend, attend_slices


class Rotary(nn.Module):
    """Cosine and sine tables (L, K/2) of rotary positions."""

    def __init__(self, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.head_width, self.base = head_width, base
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.empty(head_width // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the table; also after `to_empty` on a meta device."""
        with torch.no_grad():
            self.inv_freq.copy_(inverse_frequencies(self.head_width, self.base))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq.float())
        return angles.cos(), angles.sin()


def inverse_frequencies(head_width: int, base: float = 10_000.0) -> Tensor:
    """Radians per position (K/2,) of the pairs of a head."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width
    return 1.0 / base**exponent


def rotate(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (k, k + K/2) by its position's angle; the tables are (L, K/2), of packed samples (B, L, K/2)."""
    first, second = x_BLHK.chunk(2, dim=-1)
    both = (torch.cat(halves, dim=-1).to(x_BLHK.dtype).unsqueeze(-2) for halves in ((cos, cos), (-sin, sin)))
    if x_BLHK.device.type == "cpu" and cos.dim() == 2:
        # One row of numbers for all heads of a position: torch multiplies half a head at a time three times as slowly.
        both = (table.expand(x_BLHK.shape[1:]).contiguous() for table in both)
    cosines, sines = both
    return x_BLHK * cosines + torch.cat([second, first], dim=-1) * sines


def attend_rotated(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    rotary: tuple[Tensor, Tensor],
    backend: str,
    masks: Masks = NO_MASKS,
    context: DeviceMesh | None = None,
    *,
    repeated: bool = False,
) -> Tensor:
    """Attention (B, L, H, K) in which each of G heads of keys and values serves H / G consecutive heads of queries.

    With a `context` each rank holds a slice of the sequences (`attend_slices`). `masks`, `repeated`: see `masks_of` and
    `choose_backend`.
    """
    q, k, v = rotate(q_BLHK, *rotary), rotate(k_BLGK, *rotary), v_BLGK
    if (times := q.shape[2] // k.shape[2]) > 1:
        k, v = k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)
    if context is None:
        return attend(q, k, v, backend, *masks, repeated=repeated)
    return attend_slices(q, k, v, backend, context, repeated=repeated)
