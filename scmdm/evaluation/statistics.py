"""Confidence intervals of means, and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with a two-sided 95 % interval. `half_width` is nan for a single value."""

    mean: float
    half_width: float
    values: int

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Format as in `60.3 ± 0.8`."""
        if math.isnan(self.half_width):
            return f"{self.mean * scale:.{digits}f}"
        return f"{self.mean * scale:.{digits}f} ± {self.half_width * scale:.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """Mean of a - b, its 95 % interval (Student's t) and its two-sided p value."""

    mean: float
    low: float
    high: float
    p_value: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of values with its interval from Student's t distribution."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, float("nan"), n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, half, n)


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """Mean difference of pairs (a, b) measured on the same noise; None if their spread is unknown or zero."""
    gaps = [a - b for a, b in pairs]
    if len(gaps) < 2 or np.ptp(gaps) == 0:
        return None
    result = stats.ttest_1samp(gaps, 0.0)
    interval = result.confidence_interval(LEVEL)
    return Difference(float(np.mean(gaps)), float(interval.low), float(interval.high), float(result.pvalue))
