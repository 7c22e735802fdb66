"""Wasserstein distance of many parts of one set to the same reference.

Legend: N samples, M values of the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def wasserstein_of_counts(values_N: np.ndarray, reference_M: np.ndarray) -> Callable[[np.ndarray], float]:
    """1-Wasserstein distance to the reference as a function of how often each value occurs (N,).

    Equal to scipy's `wasserstein_distance` with these weights, which sorts both sets each time; NaN if nothing occurs.
    """
    order_N = np.argsort(values_N)
    grid = np.sort(np.concatenate([values_N, reference_M]))
    widths, places = np.diff(grid), grid[:-1]
    below = np.searchsorted(values_N[order_N], places, "right")  # values up to each place
    reference_cdf = np.searchsorted(np.sort(reference_M), places, "right") / len(reference_M)

    def distance(counts_N: np.ndarray) -> float:
        cumulative = np.concatenate([[0], np.cumsum(counts_N[order_N])])
        if not cumulative[-1]:
            return float("nan")
        return float((np.abs(cumulative[below] / cumulative[-1] - reference_cdf) * widths).sum())

    return distance
