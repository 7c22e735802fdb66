"""Where the time of a step goes, what the hardware does in it, and which rank the others wait for."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.state import State
from scmdm.models.flops import StepFlops
from scmdm.system.process_group import all_gather_object

# Parts of a step in their order. `sync`: waiting for the other ranks at its start. `pass_2` holds the head's backward
# pass, which the head makes together with its forward pass.
PARTS = ("data", "sync", "pass_1", "pass_2", "backward", "optimizer", "checkpoint")
PROFILED_STEPS = 3


class Clock:
    """Adds up seconds by part. On a GPU, where the host runs ahead, parts lie between events that are read at the end
    of a window: measuring never makes the host wait. `alive` hears of every part that begins or has ended."""

    def __init__(self, device: torch.device, alive: Callable[[str], None] | None = None) -> None:
        self._cuda, self._alive = device.type == "cuda", alive or (lambda _: None)
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as `name`, one of PARTS. `data` and `checkpoint` are the host's, the others the device's."""
        assert name in PARTS
        self._alive(name)
        if self._cuda and name not in ("data", "checkpoint"):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
        self._alive(f"after {name}")

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        found = {name: self._seconds.get(name, 0.0) for name in PARTS}
        self._seconds.clear()
        self._events.clear()
        return found


class TimedDenoiser:
    """A denoiser whose passes are counted by a clock."""

    def __init__(self, denoiser: Denoiser, clock: Clock) -> None:
        self._denoiser, self._clock = denoiser, clock

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        with self._clock.part("pass_1"):
            return self._denoiser.estimate(state, dropout=dropout)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        with self._clock.part("pass_2"):
            return self._denoiser.weighted_nll(state, x_BL, weight_BL)


class Window:
    """The steps since the last logged one, without what is not training."""

    def __init__(self) -> None:
        self.steps = self.tokens = 0
        self._started = time.perf_counter()

    def add(self, tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began


@dataclass(frozen=True)
class Hardware:
    """What a rank has, and what one sequence asks of it."""

    flops: StepFlops
    peak_flops: float | None
    world_size: int

    def utilisation(self, sequences_per_s: float) -> dict[str, float | None]:
        """Tera-operations a second per rank, and the share of the peak, with and without the no-grad passes."""
        per_rank = sequences_per_s / self.world_size
        rates = {"": self.flops.total * per_rank, "_loss_pass": self.flops.loss_pass * per_rank}
        found: dict[str, float | None] = {f"tflops{kind}": rate / 1e12 for kind, rate in rates.items()}
        for kind, rate in rates.items():
            found[f"mfu{kind}"] = rate / self.peak_flops if self.peak_flops else None
        return found


def step_parts(seconds: dict[str, float], steps: int) -> dict[str, float | int | None]:
    """Seconds per step of each part (mean of the ranks), and the rank that the others wait for.

    All ranks meet at the start of a step. Who comes last waits least: its lag is what the median rank waits longer.
    """
    everyone = all_gather_object(seconds)
    found: dict[str, float | int | None] = {
        f"{name}_s": statistics.fmean(rank[name] for rank in everyone) / steps for name in PARTS
    }
    waits = [rank["sync"] / steps for rank in everyone]
    alone = len(waits) == 1
    found["slowest_rank"] = None if alone else waits.index(min(waits))
    found["slowest_rank_lag_s"] = None if alone else statistics.median(waits) - min(waits)
    return found


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: on the GPU, or on the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Profiler:
    """A torch profiler trace of `PROFILED_STEPS` steps from `first` on, one file per rank (0: none)."""

    def __init__(self, directory: Path, first: int, rank: int) -> None:
        self._path = directory / "profile" / f"step_{first:08d}_rank_{rank}.json"
        self._first = first
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Start, if `step` (counted from 1) is the first one to be seen."""
        if step == self._first:
            self._profile = torch.profiler.profile()
            self._profile.start()

    def after(self, step: int) -> Path | None:
        """Stop and write behind the last one; returns the file then."""
        if self._profile is None or step < self._first + PROFILED_STEPS - 1:
            return None
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        return self._path
