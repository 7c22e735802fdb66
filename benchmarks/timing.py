"""Medians with warm-up, and a table that keeps the raw figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    rounds: int = 15,
    after: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time all functions in turn, round by round, so that a slow phase of the machine hits all of them alike.

    `after` is called behind each of them and not timed.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
            after()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(_once(function))
            after()
    return {name: _summary(values) for name, values in seconds.items()}


def _once(function: Callable[[], object]) -> float:
    _synchronize()
    started = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(values: list[float]) -> Timing:
    deciles = statistics.quantiles(values, n=10)
    return Timing(statistics.median(values), deciles[0], deciles[-1])


def show(title: str, timings: Mapping[str, Timing], reference: str) -> None:
    """Print medians and their ratio to `reference`."""
    print(f"\n{title}")
    for name, timing in timings.items():
        ratio = timing.median / timings[reference].median
        spread = f"[{1e3 * timing.low:.2f}, {1e3 * timing.high:.2f}]"
        print(f"  {name:<44}{1e3 * timing.median:9.2f} ms {spread:<18} {ratio:6.2f} x {reference}")
