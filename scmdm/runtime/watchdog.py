"""Watchdog: ends a run that makes no progress, after every rank has written the stacks of all its threads.

Progress means that a part of a step has begun or ended (`StepTimer`), or that a batch of a validation is done. For
start-up, the first step (which may compile), checkpoints and the end of a run the limit is `PATIENCE` times as long.
Sampling and evaluation are watched while a rank computes its share (`scmdm.runtime.divided_work`), always with the
longer limit: progress is a step of a sampler or a batch.

A rank that waits for another one in a collective makes no progress either. The first rank that exceeds the limit leaves
an alarm file in the run directory; the others find it and write their stacks, too, and on GPUs NCCL's flight recorder.
Once another process has taken the run over, nothing more is written there: an alarm would end the new owner's ranks.

`faulthandler` writes the stacks. Its own thread also ends the process, with status 1, if the watchdog's thread is
blocked because C code holds the interpreter's lock or the run's file system hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from scmdm.runtime.flight_recorder import dump_flight_recorder, dumping_to, written_records
from scmdm.system.lease import Fence
from scmdm.system.process_group import World
from scmdm.system.run_directory import STACKS
from scmdm.system.signals import stop_signals

HANG_EXIT = 86  # exit status: no progress for train.watchdog_minutes, or for `PATIENCE` times _SHARE_MINUTES
PATIENCE = 4.0
_SHARE, _SHARE_MINUTES = "its share of the work", 10.0
_PATIENT_PARTS = ("start", "checkpoint", "end")
_ALARM, _SUMMARIZED = ".hang", ".summed"
_HEADER = "=== "
_LONGEST_POLL_S = 5.0
_ANSWER_S = 5.0  # maximum wait of rank 0 for the other ranks' stacks
_LEAVE_S = 15.0  # maximum wait of the other ranks for rank 0's summary

logger = logging.getLogger("scmdm")


@dataclass(frozen=True)
class _Progress:
    part: str  # part that has begun
    step: int | None  # last complete step
    limit_s: float  # seconds until the next progress

    def __str__(self) -> str:
        if self.part == _SHARE:
            return f"in {_SHARE}"
        return f"in {self.part}, {'before the first step' if self.step is None else f'last step {self.step}'}"


def collective_timeout(minutes: float) -> timedelta | None:
    """Timeout for collectives that exceeds every limit of a watchdog of `minutes`; None (torch's) without watchdog."""
    return timedelta(minutes=PATIENCE * minutes + 5) if minutes else None


def set_aside_stacks(directory: Path) -> None:
    """Move an earlier start's stacks to `stacks.before` and clear its alarm; call this before any rank watches.

    NCCL's records move with them: NCCL may have ended the processes before the watchdog wrote any stack.
    """
    old, older = directory / STACKS, directory / f"{STACKS}.before"
    if written_stacks(directory) or written_records(old):
        shutil.rmtree(older, ignore_errors=True)
        old.rename(older)
    shutil.rmtree(old, ignore_errors=True)


def written_stacks(directory: Path) -> list[Path]:
    """List the stack files that ranks have written since the last start of the run in `directory`."""
    return sorted(path for path in (directory / STACKS).glob("rank_*.txt") if path.is_file() and path.stat().st_size)


class Watchdog:
    """Context manager that watches one rank; with `minutes=0` it does nothing."""

    def __init__(self, directory: Path, world: World, minutes: float, fence: Fence | None = None) -> None:
        self._world, self._limit_s, self._fence = world, 60 * minutes, fence
        self._poll_s = min(_LONGEST_POLL_S, self._limit_s / 10)
        self._place = directory / STACKS
        self._path = self._place / f"rank_{world.rank}.txt"
        self._step: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: IO[str] | None = None
        self._stack_signal = self._own_crashes = False
        self.beat("start")

    def beat(self, part: str) -> None:
        """Report progress: `part` begins."""
        patient = part in _PATIENT_PARTS or self._step is None
        self._progress = _Progress(part, self._step, self._limit_s * (PATIENCE if patient else 1))

    def step_done(self, step: int) -> None:
        """Report progress: `step` is complete."""
        self._step = step
        self.beat("after the step")

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._place.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")  # open it now: later the disk may be full or hang
            # Loader processes inherit this handler, so that they can write their stacks, too.
            # Not if it is a stop signal: sampling and evaluation install no handler, so that it must end the process.
            self._stack_signal = (
                signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL and signal.SIGUSR2 not in stop_signals()
            )
            if self._stack_signal:
                faulthandler.register(signal.SIGUSR2, file=self._file)
            self._own_crashes = not faulthandler.is_enabled()
            if self._own_crashes:
                faulthandler.enable(self._file)
            self._arm(PATIENCE * self._limit_s)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._file is None:
            return
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._stack_signal:
            faulthandler.unregister(signal.SIGUSR2)
        if self._own_crashes:
            faulthandler.disable()
        self._file.close()
        if self._fence is not None and not self._fence.still_owned():
            return
        with contextlib.suppress(OSError):  # the last rank removes the directory
            if self._path.stat().st_size == 0:
                self._path.unlink()
            self._place.rmdir()

    def _arm(self, seconds: float) -> None:
        """Make faulthandler write the stacks and end the process unless this is called again within `seconds`."""
        assert self._file is not None
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def _watch(self) -> None:
        seen, silent_s, before = self._progress, 0.0, time.monotonic()
        while not self._done.wait(self._poll_s):
            self._arm(PATIENCE * self._limit_s)
            now = time.monotonic()
            # A longer gap means that the whole process was suspended, which is not a hang.
            silent_s += min(now - before, 2 * self._poll_s)
            before = now
            if self._progress is not seen:
                seen, silent_s = self._progress, 0.0
            if silent_s > seen.limit_s or (self._place / _ALARM).exists():
                self._end(seen, silent_s)

    def _end(self, progress: _Progress, silent_s: float) -> None:
        """Alarm the other ranks, write the stacks and end the process."""
        self._arm(2 * self._poll_s + 2 * _LEAVE_S)  # in case a call below blocks
        if self._fence is not None and not self._fence.still_owned():
            logger.error("watchdog: no progress, and the run was taken over; exit status %d", HANG_EXIT)
            os._exit(HANG_EXIT)
        # Each alone: on a full disk no stack can be written, but the other ranks must learn of the hang.
        for step in (
            (self._place / _ALARM).touch,
            lambda: self._dump(progress, silent_s),
            self._dump_children,
            lambda: dump_flight_recorder(self._place, self._world.rank),
        ):
            with contextlib.suppress(OSError):
                step()
        hang = f"rank {self._world.rank} has made no progress for {silent_s:.0f} s ({progress})"
        logger.error("watchdog: %s; the stacks of all ranks are in %s; exit status %d", hang, self._place, HANG_EXIT)
        # The launcher ends all ranks when the first one ends, so wait for rank 0's summary.
        with contextlib.suppress(OSError):
            if self._world.is_main:
                time.sleep(2 * self._poll_s)  # until the others have seen the alarm
                _wait_for(lambda: len(written_stacks(self._place.parent)) == self._world.size, _ANSWER_S)
                logger.error("watchdog: %s", _summary(self._place, self._world.size))
                (self._place / _SUMMARIZED).touch()
            _wait_for((self._place / _SUMMARIZED).exists, 2 * self._poll_s + _LEAVE_S)
        os._exit(HANG_EXIT)

    def _dump(self, progress: _Progress, silent_s: float) -> None:
        assert self._file is not None
        now, host = datetime.now().astimezone().isoformat(timespec="seconds"), socket.gethostname()
        rank = f"rank {self._world.rank} on {host}, process {os.getpid()}"
        self._file.write(f"{_HEADER}{now} {rank}: no progress for {silent_s:.0f} s | {progress}\n")
        # faulthandler stops after a hundred threads, and the main thread comes last.
        self._file.write(f"Main thread (most recent call first):\n{_main_stack()}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file)

    def _dump_children(self) -> None:
        """Make the loader's processes write their stacks, then end them, because they would outlive this process."""
        assert self._file is not None
        for child in multiprocessing.active_children():
            if child.pid is None:
                continue
            with contextlib.suppress(OSError):
                self._file.write(f"--- child process {child.pid}, {child.name}\n")
                self._file.flush()
            with contextlib.suppress(ProcessLookupError):
                if self._stack_signal:
                    os.kill(child.pid, signal.SIGUSR2)
                    time.sleep(0.2)
                child.kill()


_of_share: Watchdog | None = None


@contextlib.contextmanager
def watching_share(directory: Path, world: World) -> Iterator[None]:
    """Watch this rank while it computes its share of a job's work.

    Stacks, and NCCL's records beside them, are written into `directory`.
    """
    global _of_share
    with Watchdog(directory, world, _SHARE_MINUTES) as watchdog, dumping_to(directory / STACKS):
        _of_share = watchdog
        report_progress()
        try:
            yield
        finally:
            _of_share = None


def report_progress() -> None:
    """Report progress of this rank's share, in any thread."""
    if (watchdog := _of_share) is not None:
        watchdog.beat(_SHARE)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)


def _main_stack() -> str:
    """The main thread's stack without source text: reading source files could hang."""
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    places = [(frame.f_code, line) for frame, line in traceback.walk_stack(main)] if main is not None else []
    return "".join(f'  File "{code.co_filename}", line {line} in {code.co_name}\n' for code, line in places)


def _summary(place: Path, ranks: int) -> str:
    """Summarize where each rank hangs, places of few ranks first, because those ranks are likely the cause."""
    found = defaultdict(list)
    for rank in range(ranks):
        headers = []
        with contextlib.suppress(OSError):
            lines = (place / f"rank_{rank}.txt").read_text(errors="replace").splitlines()
            headers = [line.rpartition(" | ")[2] for line in lines if line.startswith(_HEADER)]
        found[headers[-1] if headers else "no stacks (stopped, or its machine is down)"].append(str(rank))
    in_order = sorted(found.items(), key=lambda item: len(item[1]))
    return "; ".join(f"{where}: rank {', '.join(ranks_there)}" for where, ranks_there in in_order)
