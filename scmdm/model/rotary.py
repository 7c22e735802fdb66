"""Rotary positions (arXiv 2104.09864), half-split layout, and attention between rotated queries and keys.

Legend: B batch, L length, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.model.attention import NO_MASKS, Masks, attend, attend_slices


class Rotary(nn.Module):
    """Tables (L, K) of rotary positions: the cosines twice, and the sines negative and positive."""

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
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def inverse_frequencies(head_width: int, base: float = 10_000.0) -> Tensor:
    """Radians per position (K/2,) of the pairs of a head."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width
    return 1.0 / base**exponent


def rotate(x_BLHK: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate each pair (k, k + K/2) by its position's angle; tables are (L, 1, K), of packed samples (B, L, 1, K)."""
    if x_BLHK.device.type == "cpu" and cosines.dim() == 3 and not torch.is_grad_enabled():
        # A row of numbers for all heads of a position: torch is three times as fast as by heads. A backward pass would
        # have to keep them.
        cosines, sines = (table.expand(x_BLHK.shape[1:]).contiguous() for table in (cosines, sines))
    first, second = x_BLHK.chunk(2, dim=-1)
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
    cosines, sines = (table.to(q_BLHK.dtype).unsqueeze(-2) for table in rotary)
    q, k, v = rotate(q_BLHK, cosines, sines), rotate(k_BLGK, cosines, sines), v_BLGK
    if (times := q.shape[2] // k.shape[2]) > 1:
        k, v = k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)
    if context is None:
        return attend(q, k, v, backend, *masks, repeated=repeated)
    return attend_slices(q, k, v, backend, context, repeated=repeated)
