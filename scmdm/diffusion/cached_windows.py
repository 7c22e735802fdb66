"""Windows that a sampler evaluates with a cache of keys and values, and what they cost and change.

A step evaluates the positions that the cache lacks, up to the end of the block that it decodes:

- "blocks", for a model of blocks: the finished blocks that are not in the cache, and the step's block. Keys and values
  of finished blocks do not depend on later tokens, and the cache is exact. A finished block enters the cache together
  with the first step of the next one, which costs no further evaluation; a prompt likewise.
- "prefix", for any model (Fast-dLLM, arXiv 2505.22618): the first step of a block evaluates whole sequences; the others
  take keys and values of what precedes the block from that step.
- "dual": likewise, with what follows the block, too.

The last two are approximations, because attention in both directions lets keys and values depend on all tokens.

Legend: B batch, L length, N positions, V vocabulary with the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.diffusion.guidance import Guided
from scmdm.diffusion.key_value_cache import KeyValueCache, Window
from scmdm.diffusion.reveal_order import SamplerSettings, Step

_CHUNK = 512  # positions whose logits are compared at once


@dataclass(frozen=True)
class CacheDeviation:
    """Sums over compared predictions of the difference that an approximate cache makes."""

    positions: int = 0
    variation: float = 0.0  # total variation distance from the prediction without a cache
    disagreements: int = 0  # predictions with another most probable token

    def describe(self) -> str:
        """Return the mean difference, for a line of text."""
        distance, others = self.variation / self.positions, self.disagreements / self.positions
        return f"total variation {distance:.4f}, other best token {others:.2%}, of {self.positions} predictions"

    def __add__(self, other: CacheDeviation) -> CacheDeviation:
        return CacheDeviation(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class CachedWindows:
    """Windows of the sequences of a batch, step by step; without a cache, only their cost is counted.

    `predictions` is 2 with guidance, whose predictions have keys and values of their own. `lengths_B` are the tokens of
    each sequence without padding, which is not counted: the cost of a sample does not depend on its batch.
    """

    def __init__(
        self,
        settings: SamplerSettings,
        predictions: int,
        rows: int,
        length: int,
        *,
        device: torch.device,
        lengths_B: Tensor | None = None,
    ) -> None:
        self._kind, self._every = settings.cache, settings.cache_check
        self._before = 1 if settings.logit_shift else 0  # positions that are evaluated again, to predict the first
        self._predictions, self._length = predictions, length
        self._cache = KeyValueCache(predictions * rows, length)
        # "blocks": the number of positions in the cache; otherwise the block for which whole sequences were evaluated.
        self._done_B = torch.full((rows,), 0 if settings.cache == "blocks" else -1, device=device)
        whole_B = torch.full((rows,), length, dtype=torch.int64, device=device)
        self._lengths_B = whole_B if lengths_B is None else lengths_B.to(device)
        self.positions_B, self._approximated_B = torch.zeros_like(whole_B), torch.zeros_like(whole_B)
        self.deviation = CacheDeviation()

    @property
    def cached(self) -> bool:
        """Whether there is a cache."""
        return self._kind != "none"

    def count_all(self) -> None:
        """Count an evaluation of all sequences."""
        self.positions_B += self._predictions * self._lengths_B

    def count(self, rows: Tensor, width: int, start_B: Tensor | None = None) -> None:
        """Count an evaluation of `width` positions of some sequences, from `start_B` or from the first."""
        first_B = torch.zeros_like(rows) if start_B is None else start_B
        end_B = torch.minimum(first_B + width, self._lengths_B[rows])
        self.positions_B[rows] += self._predictions * (end_B - first_B).clamp(min=0)

    def of(self, step: Step, rows: Tensor) -> Iterator[tuple[Tensor, Window]]:
        """Yield the windows of a step, each with its sequences among `rows`: those of one width together."""
        assert step.first_B is not None
        assert step.end_B is not None
        first_B, end_B, done_B = step.first_B[rows], step.end_B[rows], self._done_B[rows]
        if self._kind == "blocks":
            start_B = done_B
        else:
            fresh_B = done_B != first_B
            start_B = first_B.masked_fill(fresh_B, 0)
            end_B = end_B if self._kind == "dual" else torch.full_like(end_B, self._length)
            end_B = end_B.masked_fill(fresh_B, self._length)
        start_B = (start_B - self._before).clamp(min=0)
        width_B = end_B - start_B
        for width in width_B.unique().tolist():
            chosen_B = width_B == width
            own_rows, own_start = rows[chosen_B], start_B[chosen_B]
            self.count(own_rows, width, own_start)
            yield own_rows, self._window(own_rows, own_start, first_B[chosen_B], width)
            self._done_B[own_rows] = first_B[chosen_B]

    def _window(self, rows: Tensor, start_B: Tensor, first_B: Tensor, width: int) -> Window:
        aligned = bool((start_B == start_B[0]).all())
        start = int(start_B[0]) if aligned else None
        whole = len(rows) == len(self._done_B)
        end = int(start_B.max()) + width if self._kind == "blocks" else self._length
        # Without earlier blocks among the queries and later ones among the keys, there is nothing to hide.
        alone = self._kind != "blocks" or (aligned and bool((first_B == start_B).all()))
        return Window(self._cache, start_B, width, end, None if whole else rows, start, alone)

    def to_check(self, rows: Tensor, window: Window) -> Tensor:
        """Return which of a window's sequences (N,) to compare with predictions without the cache.

        These are the first approximate step of a sequence and every `cache_check`-th after it. The number of the step
        would not do: where it is a multiple of the steps per block, all sequences are evaluated as a whole.
        """
        if self._kind not in ("prefix", "dual") or window.width >= self._length or not self._every:
            return rows[:0]
        due_B = self._approximated_B[rows] % self._every == 0
        self._approximated_B[rows] += 1
        return due_B.nonzero().squeeze(1)

    def compare(self, view: Guided, cached_ND: Tensor, exact_ND: Tensor) -> None:
        """Add the difference between predictions with and without the cache."""
        for ours_ND, theirs_ND in zip(cached_ND.split(_CHUNK), exact_ND.split(_CHUNK), strict=True):
            ours_NV, theirs_NV = (view.logits(h).double().softmax(1) for h in (ours_ND, theirs_ND))
            variation = float((ours_NV - theirs_NV).abs().sum()) / 2
            other = int((ours_NV.argmax(1) != theirs_NV.argmax(1)).sum())
            self.deviation += CacheDeviation(len(ours_ND), variation, other)
