"""Intervals and tests for samples, and summaries for trainings.

Two sources of variation are kept apart, and every result says over which it ranges:

* **samples**: models are given; another draw of samples would give other numbers. Wilson intervals and McNemar's test
  for proportions, the bootstrap for every other metric. Two models that sampled on the same noise are paired sample by
  sample: both are resampled with the same indices.
* **trainings**: another seed would give another model. Two or three trainings support no interval: their values are
  listed with their range.

Sources: Wilson (1927); McNemar (1947), exact form; Bonett and Price (2012) for the difference of paired proportions;
Efron (1979), Davison and Hinkley (1997), sections 5.2 to 5.4; Holm (1979).

Legend: N samples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2_000
Metric = Callable[[np.ndarray], float]  # from indices (N,) into the samples to the metric of those samples


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided 95 % interval over `over`; without an interval `low` and `high` are the value."""

    value: float
    low: float
    high: float
    over: str


@dataclass(frozen=True)
class Comparison:
    """Difference of two models, first less second, with its 95 % interval and two-sided p value over `over`."""

    difference: float
    low: float
    high: float
    p_value: float
    over: str


@dataclass(frozen=True)
class Trainings:
    """The values of several trainings: mean and range, which is no interval."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def agree(self) -> bool:
        """All values have the same sign, none is zero."""
        return min(self.values) > 0 or max(self.values) < 0


def proportion(successes: int, samples: int) -> Estimate:
    """Share of samples with a property, with Wilson's interval. Raises ValueError without samples."""
    found = stats.binomtest(successes, samples).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / samples, float(found.low), float(found.high), f"{samples} samples")


def paired_proportions(first_N: np.ndarray, second_N: np.ndarray) -> Comparison:
    """Difference of two proportions of the same N noise draws, boolean arrays (N,).

    The p value is McNemar's, exact: a sign test on the samples in which the two differ. The interval is Bonett and
    Price's adjusted Wald interval, which keeps its level for few discordant samples.
    """
    first_N, second_N = np.asarray(first_N, bool), np.asarray(second_N, bool)
    if first_N.shape != second_N.shape or first_N.ndim != 1 or not len(first_N):
        raise ValueError(f"samples of shapes {first_N.shape} and {second_N.shape} are not pairs")
    n = len(first_N)
    gained, lost = int((first_N & ~second_N).sum()), int((~first_N & second_N).sum())
    p_value = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    p_gained, p_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    error = math.sqrt((p_gained + p_lost - (p_gained - p_lost) ** 2) / (n + 2))
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    centre = p_gained - p_lost
    difference = (gained - lost) / n
    return Comparison(difference, max(-1.0, centre - half), min(1.0, centre + half), p_value, f"{n} paired samples")


def bootstrap(metric: Metric, samples: int, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A metric of N samples with its basic bootstrap interval, [2 m - q_97.5, 2 m - q_2.5].

    The basic interval also removes the bias that resampling adds to distances and entropies: a resample repeats
    samples, and so lies further from the truth than the samples themselves.
    """
    value = metric(np.arange(samples))
    low, high = _basic(value, np.array([metric(indices) for indices in _draws(samples, seed, resamples)]))
    return Estimate(value, low, high, f"{samples} samples")


def paired_bootstrap(
    first: Metric, second: Metric, samples: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """Difference of a metric of two models that sampled on the same N noise draws: both see the same resamples.

    The p value is that of the largest interval which excludes zero, at least 1 / R.
    """
    value = first(np.arange(samples)) - second(np.arange(samples))
    gaps_R = np.array([first(indices) - second(indices) for indices in _draws(samples, seed, resamples)])
    low, high = _basic(value, gaps_R)
    # An interval of level 1 - p reaches zero where 2 m lies at a quantile of the resamples.
    beyond = min((gaps_R >= 2 * value).mean(), (gaps_R <= 2 * value).mean())
    p_value = min(1.0, max(2 * float(beyond), 1 / resamples))
    return Comparison(value, low, high, p_value, f"{samples} paired samples")


def _draws(samples: int, seed: int, resamples: int) -> Sequence[np.ndarray]:
    if samples < 2:
        raise ValueError(f"{samples} samples; a resample needs at least 2")
    generator = np.random.default_rng([seed, samples, resamples])
    return [generator.integers(0, samples, samples) for _ in range(resamples)]


def _basic(value: float, resampled_R: np.ndarray) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled_R, [tail, 1 - tail])
    return float(2 * value - high), float(2 * value - low)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: at a level of 5 % the chance of one false claim among all of them is at most 5 %."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return [float(p) for p in adjusted]
