"""Interpolated modified Kneser-Ney n-gram model (Chen and Goodman 1999)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

UNKNOWN, START = "<unk>", "<s>"
_LEAST_DISCOUNT = 1e-3  # above 0, so that every context leaves probability for unseen units
Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Level:
    """Counts of one order: n-gram counts at the highest order, continuation counts below it."""

    counts: dict[Gram, int]
    totals: dict[Gram, int]  # by context
    discounts: tuple[float, float, float]  # for the counts 1, 2, and 3 or more
    kinds: dict[Gram, tuple[int, int, int]]  # by context: number of successors with count 1, 2, and 3 or more


class NgramModel:
    """Model whose probabilities over the units seen in training and `<unk>` sum to one in every context."""

    def __init__(self, levels: Sequence[_Level], vocabulary: set[str], split: Callable[[str], Sequence[str]]) -> None:
        self._levels, self.vocabulary, self._split = levels, vocabulary, split
        self.order = len(levels)

    @classmethod
    def fit(cls, texts: Iterable[str], *, order: int, split: Callable[[str], Sequence[str]] = list) -> NgramModel:
        """Fit the model to texts. `split` divides a text into units: `list` into characters, `str.split` into words."""
        grams: Counter[Gram] = Counter()
        vocabulary = {UNKNOWN}
        for text in texts:
            units = split(text)
            vocabulary.update(units)
            padded = [START] * (order - 1) + list(units)
            grams.update(tuple(padded[i : i + order]) for i in range(len(units)))
        levels = [_make_level(grams)]
        while order > 1:
            grams = Counter(gram[1:] for gram in grams)
            levels.append(_make_level(grams))
            order -= 1
        return cls(levels[::-1], vocabulary, split)

    def probability(self, unit: str, context: Gram) -> float:
        """`p(unit | context)`; only the last `order - 1` units of the context matter."""
        unit = unit if unit in self.vocabulary else UNKNOWN
        p = 1 / len(self.vocabulary)
        for n, level in enumerate(self._levels):
            history = context[len(context) - n :] if n else ()
            total = level.totals.get(history)
            if total is None:
                return p
            count = level.counts.get((*history, unit), 0)
            kept = count - level.discounts[min(count, 3) - 1] if count else 0.0
            freed = sum(d * k for d, k in zip(level.discounts, level.kinds[history], strict=True))
            p = (kept + freed * p) / total
        return p

    def log_prob(self, text: str) -> tuple[float, int]:
        """Log-probability in nats, and number of units, of a text."""
        units = [u if u in self.vocabulary else UNKNOWN for u in self._split(text)]
        padded = (START,) * (self.order - 1) + tuple(units)
        total = 0.0
        for i, unit in enumerate(units):
            total += math.log(self.probability(unit, padded[i : i + self.order - 1]))
        return total, len(units)


def _make_level(counts: Counter[Gram]) -> _Level:
    totals: Counter[Gram] = Counter()
    kinds: defaultdict[Gram, list[int]] = defaultdict(lambda: [0, 0, 0])
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]][min(count, 3) - 1] += 1
    frozen = {context: (k[0], k[1], k[2]) for context, k in kinds.items()}
    return _Level(dict(counts), dict(totals), _discounts(Counter(counts.values())), frozen)


def _discounts(count_of: Counter[int]) -> tuple[float, float, float]:
    """Discounts of Chen and Goodman, equation 26, bounded below; (0.5, 1, 1.5) if a count of counts is zero."""
    n1, n2, n3, n4 = (count_of[k] for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return 0.5, 1.0, 1.5
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return tuple(min(max(d, _LEAST_DISCOUNT), k) for d, k in zip(found, (1, 2, 3), strict=True))  # type: ignore[return-value]
