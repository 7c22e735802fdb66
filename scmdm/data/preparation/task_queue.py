"""Tasks that any number of processes, on any number of machines with a common file system, work off together.

A task's result is a directory that is complete or absent, and the same whoever makes it. So nothing has to be agreed:
a worker takes its own share of the tasks first, then whatever of the others' nobody is at. Who is at a task says so in
a file and touches it; when that is wrong, work is done twice and nothing else happens. A worker that is killed, or that
SLURM has not started yet, is not waited for.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from scmdm.errors import UserError
from scmdm.system.files import atomic_directory
from scmdm.system.liveness import process_lives

_BEAT_S, _SILENT_S, _POLL_S = 5.0, 60.0, 0.2


@dataclass(frozen=True)
class Task:
    """`run` writes the result into the empty directory that it is given."""

    name: str
    run: Callable[[Path], None]


@dataclass(frozen=True)
class Worker:
    """One of `count` processes."""

    index: int = 0
    count: int = 1


def work_off(place: Path, tasks: Sequence[Task], worker: Worker, on_done: Callable[[int], None]) -> None:
    """Return when every task has its result `place/NAME`, or when `place` is gone: all of the work was finished.

    `on_done` hears of how many of the tasks that is known. Raises what a task raises.
    """
    own = tasks[worker.index :: worker.count]
    names = {task.name for task in own}
    order = [*own, *(task for task in reversed(tasks) if task.name not in names)]  # far from where their owners begin
    while order and place.is_dir():
        waiting = []
        for at, task in enumerate(order, start=1):
            if not _try(place, task):
                waiting.append(task)
            on_done(len(tasks) - len(order) + at - len(waiting))
        order = waiting
        if order:
            time.sleep(_POLL_S)


def _try(place: Path, task: Task) -> bool:
    """Whether the task has its result, if need be by making it; not while another worker is at it."""
    result = place / task.name
    if result.is_dir():
        return True
    with _claim(place / f".{task.name}.claim") as free:
        if not free:
            return False
        if not result.is_dir():
            _make(result, task)
    return True


def _make(result: Path, task: Task) -> None:
    try:
        with atomic_directory(result) as temporary:
            task.run(temporary)
    except UserError:
        if not result.is_dir() and result.parent.is_dir():  # else another worker was faster, here or with everything
            raise


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    if not _take(path):
        yield False
        return
    stop = threading.Event()
    threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
    try:
        yield True
    finally:
        stop.set()
        path.unlink(missing_ok=True)


def _take(path: Path) -> bool:
    try:
        with open(path, "x") as file:
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    except FileExistsError:
        if not _is_dead(path):
            return False
        path.unlink(missing_ok=True)
        return _take(path)
    except FileNotFoundError:
        return False  # all of the work was finished
    return True


def _is_dead(path: Path) -> bool:
    try:
        silent = time.time() - path.stat().st_mtime > _SILENT_S
        claim = json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except json.JSONDecodeError:
        return silent  # not written yet
    return silent or (claim["host"] == socket.gethostname() and not process_lives(claim["pid"]))


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_S):
        with suppress(OSError):
            os.utime(path)
