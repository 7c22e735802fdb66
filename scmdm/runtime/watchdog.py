"""Ends a run that shows no sign of life, after the stacks of all threads of every rank were written down.

Life is what only a working process can do: a part of a step has begun or ended (`Clock`), or a batch of a validation is
done. Writing a checkpoint, starting, the first step (which may compile) and what comes after the last one have no such
small parts: they get `PATIENCE` times as long.

A rank that waits for another in a collective shows no life either. Who notices first leaves a file in the run
directory, the others see it and write their stacks, too, whatever they are waiting for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from scmdm.system.process_group import World

HANG_EXIT = 86  # no sign of life for train.watchdog_minutes
STACKS = "stacks"
PATIENCE = 4.0
_SLOW = ("start", "checkpoint", "end")
_ALARM = ".hang"
_SUMMED = ".summed"
_HEADER = "=== "
_SLOWEST_POLL_S = 5.0
_ANSWER_S = 5.0  # for the other ranks' stacks, once they have seen the alarm
_LAST_RESORT_S = 15.0

logger = logging.getLogger("scmdm")


@dataclass(frozen=True)
class _Sign:
    """The last sign of life."""

    part: str
    step: int | None  # the last step that was done
    limit: float  # seconds until the next one


def longest_silence(minutes: float) -> timedelta | None:
    """More than a watchdog of so many minutes ever waits; None without one."""
    return timedelta(minutes=PATIENCE * minutes + 5) if minutes else None


def set_aside_stacks(directory: Path) -> None:
    """Keep the stacks of the start before, and forget its alarm; to be called before any rank of this start watches."""
    old, older = directory / STACKS, directory / f"{STACKS}.before"
    if written_stacks(directory):
        shutil.rmtree(older, ignore_errors=True)
        old.rename(older)
    shutil.rmtree(old, ignore_errors=True)


def written_stacks(directory: Path) -> list[Path]:
    """The files of the ranks that have written stacks since the last start."""
    return sorted(path for path in (directory / STACKS).glob("rank_*.txt") if path.stat().st_size)


class Watchdog:
    """Of one rank; does nothing with `minutes=0`. Watches while its block runs."""

    def __init__(self, directory: Path, world: World, minutes: float) -> None:
        self._world, self._limit = world, 60 * minutes
        self._poll = min(_SLOWEST_POLL_S, self._limit / 10)
        self._path, self._alarm = directory / STACKS / f"rank_{world.rank}.txt", directory / STACKS / _ALARM
        self._step: int | None = None
        self._done, self._called = threading.Event(), False
        self._file: IO[str] | None = None
        self._asks_children = self._crashes_too = False
        self._threads = [threading.Thread(target=f, name="watchdog", daemon=True) for f in (self._watch, self._listen)]
        self.beat("start")

    def beat(self, part: str) -> None:
        """A sign of life: `part` begins."""
        patient = part in _SLOW or self._step is None
        self._sign = _Sign(part, self._step, self._limit * (PATIENCE if patient else 1))

    def count(self, step: int) -> None:
        """A step is done."""
        self._step = step
        self.beat("after the step")

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened now: later the disk may be full, or what hangs.
            self._file = self._path.open("a")
            # Processes of the loader inherit this: it tells where one of them hangs.
            self._asks_children = signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
            if self._asks_children:
                faulthandler.register(signal.SIGUSR2, file=self._file)
            self._crashes_too = not faulthandler.is_enabled()
            if self._crashes_too:
                faulthandler.enable(self._file)
            self._arm()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._file is None:
            return
        self._threads[0].join()
        faulthandler.cancel_dump_traceback_later()
        if self._asks_children:
            faulthandler.unregister(signal.SIGUSR2)
        if self._crashes_too:
            faulthandler.disable()
        self._file.close()
        with contextlib.suppress(OSError):  # the last of the ranks removes the directory
            if self._path.stat().st_size == 0:
                self._path.unlink()
            self._path.parent.rmdir()

    def _watch(self) -> None:
        """Looks at nothing but the clock: a file system that hangs must not make it hang."""
        assert self._file is not None
        seen, waited, before = self._sign, 0.0, time.monotonic()
        while not self._done.wait(self._poll):
            self._arm()
            now = time.monotonic()
            # A gap beyond the poll is no hang: the whole process stood still (a suspended job).
            waited += min(now - before, 2 * self._poll)
            before = now
            if self._sign is not seen:
                seen, waited = self._sign, 0.0
            if self._called or waited > seen.limit:
                self._end(seen, waited)

    def _arm(self) -> None:
        """When a C call keeps the interpreter's lock the watching thread stands still, too; then faulthandler's, which
        needs no lock, ends the process (with status 1: it knows no other)."""
        assert self._file is not None
        faulthandler.dump_traceback_later(PATIENCE * self._limit, exit=True, file=self._file)

    def _listen(self) -> None:
        while not self._done.wait(self._poll):
            if self._alarm.exists():
                self._called = True
                return

    def _end(self, sign: _Sign, waited: float) -> None:
        """Write the stacks, call the others, and leave, whatever this meets on the way."""
        threading.Thread(target=_leave, args=(2 * self._poll + _LAST_RESORT_S,), daemon=True).start()
        with contextlib.suppress(OSError):
            self._dump(sign, waited)
            self._alarm.touch()
            self._dump_children()
        place = self._path.parent
        logger.error(
            "watchdog: rank %d has shown no sign of life for %.0f s (%s); the stacks of all ranks are in %s; "
            "ending with status %d",
            self._world.rank,
            waited,
            _where(sign),
            place,
            HANG_EXIT,
        )
        # Whoever leaves makes the launcher end the others: not before they have written theirs, and rank 0 its summary.
        with contextlib.suppress(OSError):
            if self._world.is_main:
                time.sleep(2 * self._poll)  # in which they see the alarm
                _wait_for(lambda: len(written_stacks(place.parent)) == self._world.size, _ANSWER_S)
                logger.error("watchdog: %s", _summary(place, self._world.size))
                (place / _SUMMED).touch()
            _wait_for((place / _SUMMED).exists, math.inf)
        _leave(0)

    def _dump(self, sign: _Sign, waited: float) -> None:
        assert self._file is not None
        now, host = datetime.now().astimezone().isoformat(timespec="seconds"), socket.gethostname()
        who = f"rank {self._world.rank} on {host}, process {os.getpid()}"
        self._file.write(f"{_HEADER}{now} {who}: no sign of life for {waited:.0f} s | {_where(sign)}\n")
        # First, because faulthandler stops at a hundred threads and comes to this one last.
        self._file.write(f"Main thread (most recent call first):\n{_main_stack()}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file)

    def _dump_children(self) -> None:
        """The stacks of the loader's processes, which then end: they would outlive this one."""
        assert self._file is not None
        for child in multiprocessing.active_children():
            if child.pid is None:
                continue
            self._file.write(f"--- process {child.pid} of it, {child.name}\n")
            self._file.flush()
            if self._asks_children:
                os.kill(child.pid, signal.SIGUSR2)
                time.sleep(0.2)
            child.kill()


def _leave(seconds: float) -> None:
    """End the process after so long, without a word to whoever may hang."""
    time.sleep(seconds)
    os._exit(HANG_EXIT)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)


def _main_stack() -> str:
    """Places alone: looking up the lines' text would read files, and reading may be what hangs."""
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    places = [(frame.f_code, line) for frame, line in traceback.walk_stack(main)] if main is not None else []
    return "".join(f'  File "{code.co_filename}", line {line} in {code.co_name}\n' for code, line in places)


def _where(sign: _Sign) -> str:
    return f"in {sign.part}, {'before the first step' if sign.step is None else f'last step {sign.step}'}"


def _summary(place: Path, ranks: int) -> str:
    """Which ranks hang where: those that differ from the most are those to look at."""
    found = defaultdict(list)
    for rank in range(ranks):
        found[_last_header(place / f"rank_{rank}.txt")].append(str(rank))
    return "; ".join(
        f"{where}: rank {', '.join(some)}" for where, some in sorted(found.items(), key=lambda x: len(x[1]))
    )


def _last_header(path: Path) -> str:
    """Where a rank's last stacks were taken."""
    try:
        headers = [line for line in path.read_text(errors="replace").splitlines() if line.startswith(_HEADER)]
    except OSError:
        headers = []
    return headers[-1].rpartition(" | ")[2] if headers else "no stacks (stopped, or its machine is gone)"
