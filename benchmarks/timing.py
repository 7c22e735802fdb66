"""Timing of functions in interleaved rounds, whose ratios are printed and saved.

Without a GPU, CPU time is compared (`cpu`), which other load hardly changes; `wall` time includes waiting.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from scmdm.system.files import atomic_write_text

RESULTS = Path("runs/benchmarks")
CLOCK = "wall" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Timing:
    """Seconds of a function in each round."""

    wall: list[float]
    cpu: list[float]  # CPU time of all threads

    def of(self, clock: str) -> list[float]:
        return self.wall if clock == "wall" else self.cpu


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 1,
    rounds: int = 7,
    after: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time all functions in turn, round by round, so that a slow phase of the machine affects all of them alike.

    `after` is called after each function and is not timed.
    """
    timings = {name: Timing([], []) for name in functions}
    for number in range(warmup + rounds):
        for name, function in functions.items():
            wall, cpu = _once(function)
            after()
            if number >= warmup:
                timings[name].wall.append(wall)
                timings[name].cpu.append(cpu)
    return timings


def _once(function: Callable[[], object]) -> tuple[float, float]:
    _synchronize()
    started, used = time.perf_counter(), time.process_time()
    function()
    _synchronize()
    return time.perf_counter() - started, time.process_time() - used


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(timings: Mapping[str, Timing], reference: str, clock: str = CLOCK) -> dict[str, list[float]]:
    """Divide the time of each function by that of `reference`, for each round."""
    base = timings[reference].of(clock)
    return {name: [a / b for a, b in zip(one.of(clock), base, strict=True)] for name, one in timings.items()}


def show(title: str, timings: Mapping[str, Timing], reference: str, *, clock: str = CLOCK) -> None:
    """Print medians and ratios to `reference`, with their lowest and highest rounds, and save all figures."""
    print(f"\n{title} [{clock} time]")
    for name, values in ratios(timings, reference, clock).items():
        seconds = _spread([1e3 * x for x in timings[name].of(clock)], 1)
        print(f"  {name:<44}{seconds:>28} ms   {_spread(values, 2)} x {reference}", flush=True)
    rounds = {name: asdict(timing) for name, timing in timings.items()}
    save(title, {"reference": reference, "clock": clock, "rounds": rounds})


def show_figures(title: str, figures: Mapping[str, str], raw: Mapping[str, object]) -> None:
    """Print figures other than timings of interleaved rounds, and save them."""
    print(f"\n{title}")
    for name, text in figures.items():
        print(f"  {name:<44}{text}", flush=True)
    save(title, {"figures": dict(raw)})


def save(title: str, content: Mapping[str, object]) -> None:
    """Write the figures of a benchmark to `RESULTS`, with a description of the machine."""
    machine = {
        "host": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    name = "".join(c if c.isalnum() else "-" for c in title.split("(")[0].strip().lower())[:60]
    RESULTS.mkdir(parents=True, exist_ok=True)
    atomic_write_text(RESULTS / f"{name}.json", json.dumps({"title": title, **content, "machine": machine}, indent=1))


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
