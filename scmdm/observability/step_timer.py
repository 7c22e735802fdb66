"""Measure a training step: seconds per part, FLOPs utilization, the slowest rank, memory, profiler traces."""

from __future__ import annotations

import contextlib
import errno
import logging
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

from scmdm.config.training import PROFILED_STEPS
from scmdm.diffusion.objective import Denoiser
from scmdm.diffusion.state import State
from scmdm.models.flops import StepFlops
from scmdm.system.lease import Fence
from scmdm.system.process_group import gather_numbers
from scmdm.system.run_directory import PROFILE
from scmdm.system.untrusted import describe

# Parts of a step. `data`, the read of the next step's batch, and `sync`, the wait for the other ranks, come after
# `backward`. `pass_2` contains the blocks that both passes share, and the output head's backward pass,
# which runs together with its forward pass.
PARTS = ("data", "sync", "pass_1", "pass_2", "backward", "optimizer", "checkpoint")
logger = logging.getLogger("scmdm")


class StepTimer:
    """Timer that adds up seconds by part of a step.

    On a GPU, work of the device is measured between CUDA events that are read at the end of a logging window, so that
    the host never waits. `on_part` is called when a part begins, with its name, and when it ends, with `after NAME`.
    """

    def __init__(self, device: torch.device, on_part: Callable[[str], None] | None = None) -> None:
        self._cuda, self._on_part = device.type == "cuda", on_part or (lambda _: None)
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the block as `name`, one of PARTS. `data` and `checkpoint` are measured on the host."""
        assert name in PARTS
        self._on_part(name)
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
        self._on_part(f"after {name}")

    def read(self) -> dict[str, float]:
        """Return the seconds by part since the previous call."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        found = {name: self._seconds.get(name, 0.0) for name in PARTS}
        self._seconds.clear()
        self._events.clear()
        return found


class TimedDenoiser:
    """A denoiser whose passes are measured by a timer."""

    def __init__(self, denoiser: Denoiser, timer: StepTimer) -> None:
        self._denoiser, self._timer = denoiser, timer

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        with self._timer.part("pass_2"):
            return self._denoiser.lower(state, dropout=dropout)

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        with self._timer.part("pass_1"):
            return self._denoiser.estimate(state, dropout=dropout)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        with self._timer.part("pass_2"):
            return self._denoiser.weighted_nll(state, x_BL, weight_BL)


class LoggingWindow:
    """Steps, tokens and seconds since the last logged step."""

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
        """Exclude the block's time, such as a validation's."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began


@dataclass(frozen=True)
class Utilization:
    """FLOPs of one sequence, against the peak FLOPs of a rank's device (None if unknown)."""

    flops: StepFlops
    peak_flops: float | None
    world_size: int

    def at(self, sequences_per_s: float) -> dict[str, float | None]:
        """Return TFLOP/s per rank and the share of the peak (MFU), of all passes and of the pass with gradients."""
        per_rank = sequences_per_s / self.world_size
        rates = {"": self.flops.total * per_rank, "_loss_pass": self.flops.loss_pass * per_rank}
        found: dict[str, float | None] = {f"tflops{kind}": rate / 1e12 for kind, rate in rates.items()}
        for kind, rate in rates.items():
            found[f"mfu{kind}"] = rate / self.peak_flops if self.peak_flops else None
        return found


def summarize_parts(seconds: dict[str, float], steps: int) -> dict[str, float | int | None]:
    """Return, on rank 0, seconds per step of each part (mean over ranks), and the slowest rank; {} on the others.

    All ranks call this together, and each sends a number for each part. They wait for each other after the backward
    pass and the read of the next batch (`sync`), so the slowest rank waits least. Its lag is the median rank's wait
    minus its own.
    """
    gathered = gather_numbers([seconds[name] / steps for name in PARTS])
    if gathered is None:
        return {}
    by_part = dict(zip(PARTS, zip(*gathered, strict=True), strict=True))
    found: dict[str, float | int | None] = {f"{name}_s": statistics.fmean(by_part[name]) for name in PARTS}
    waits = by_part["sync"]
    alone = len(waits) == 1
    found["slowest_rank"] = None if alone else waits.index(min(waits))
    found["slowest_rank_lag_s"] = None if alone else statistics.median(waits) - min(waits)
    return found


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far, in GiB: allocated on the GPU, or else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Profiler:
    """Recorder of a profiler trace of `PROFILED_STEPS` steps, beginning with `first` (0: none), one file per rank.

    Nothing is written once another process has taken over the run of `fence`.
    """

    def __init__(self, directory: Path, first: int, rank: int, fence: Fence | None = None) -> None:
        self._fence = fence
        self._path = directory / PROFILE / f"step_{first:08d}_rank_{rank}.json"
        self._first = first
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Start recording if `step`, counted from 1, is the first to be recorded."""
        if step == self._first:
            self._profile = torch.profiler.profile()
            self._profile.start()

    def after(self, step: int) -> Path | None:
        """Write the trace and return its path if `step` is the last to be recorded."""
        if self._profile is None or step < self._first + PROFILED_STEPS - 1:
            return None
        self._profile.stop()
        profile, self._profile = self._profile, None
        if self._fence is not None and not self._fence.still_owned():
            return None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            profile.export_chrome_trace(str(self._path))
            if not self._path.is_file():  # torch leaves a part under another name, and raises nothing
                self._path.with_name(f"{self._path.name}.tmp").unlink(missing_ok=True)
                raise OSError(errno.EIO, "torch could not write all of it")
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            logger.warning("cannot write %s: %s", self._path, describe(error))
            return None
        return self._path
