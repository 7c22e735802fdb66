"""Cache of the keys and values of a denoiser's layers, and evaluations of a part of the positions against it.

A sampler that decodes blocks from left to right evaluates a window of positions, whose queries see the cached keys and
values of the others. Keys are stored after their rotation.

Legend: B sequences of an evaluation, A sequences of the cache, L length, W positions of a window, G heads of keys and
values, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values (A, L, G, K) of each layer; zero where nothing has been computed."""

    def __init__(self, sequences: int, length: int) -> None:
        self.sequences, self.length = sequences, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, window: Window, k_BWGK: Tensor, v_BWGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of a window; return those of its sequences (B, `window.end`, G, K)."""
        if layer not in self._layers:
            size = (self.sequences, self.length, *k_BWGK.shape[2:])
            self._layers[layer] = k_BWGK.new_zeros(size), v_BWGK.new_zeros(size)
        k, v = self._layers[layer]
        return window.exchange(k, k_BWGK), window.exchange(v, v_BWGK)


@dataclass(frozen=True)
class Window:
    """The positions of an evaluation: `width` consecutive ones of each sequence."""

    cache: KeyValueCache
    start_B: Tensor  # int64, first position
    width: int
    end: int  # queries see no keys from this position on
    rows_B: Tensor | None = None  # int64, sequences of the cache; None: all
    start: int | None = None  # of all sequences; None: they differ
    sees_all: bool = False  # each query sees all keys before `end` of its document, in any model

    @property
    def columns_BW(self) -> Tensor:
        """Positions, int64."""
        return self.start_B[:, None] + torch.arange(self.width, device=self.start_B.device)

    def twice(self) -> Window:
        """Return the window of the batch repeated, for a cache whose second half has the other prediction."""
        rows_B = self.rows_B
        if rows_B is not None:
            rows_B = torch.cat([rows_B, rows_B + self.cache.sequences // 2])
        return replace(self, start_B=self.start_B.repeat(2), rows_B=rows_B)

    def cut(self, values_BL: Tensor) -> Tensor:
        """Return the part (B, W, ...) of values (B, L, ...) of these sequences."""
        if self.start is not None:
            return values_BL[:, self.start : self.start + self.width]
        at_B1 = torch.arange(len(values_BL), device=values_BL.device)[:, None]
        return values_BL[at_B1, self.columns_BW]

    def exchange(self, stored_ALGK: Tensor, new_BWGK: Tensor) -> Tensor:
        """Write the window's values into a cache; return all values before `end` of its sequences."""
        if self.rows_B is None and self.start is not None:
            stored_ALGK[:, self.start : self.start + self.width] = new_BWGK
            return stored_ALGK[:, : self.end]
        rows_B = torch.arange(len(new_BWGK), device=new_BWGK.device) if self.rows_B is None else self.rows_B
        stored_ALGK[rows_B[:, None], self.columns_BW] = new_BWGK
        return stored_ALGK[:, : self.end] if self.rows_B is None else stored_ALGK[rows_B, : self.end]


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer during an evaluation."""

    window: Window
    layer: int

    def extend(self, k_BWGK: Tensor, v_BWGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the window's keys and values; return those that its queries see."""
        return self.window.cache.update(self.layer, self.window, k_BWGK, v_BWGK)
