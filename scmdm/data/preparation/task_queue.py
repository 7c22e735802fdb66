"""Tasks that any number of processes, on machines that share a file system, complete together.

A task's result is a directory that is complete or absent, and identical whichever worker makes it. A worker takes its
own share of the tasks first, then unclaimed tasks of other workers. It holds a lease (`scmdm.system.lease`)
while it works on a task. Workers that were killed, or that SLURM has not started yet, are not waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scmdm.errors import InUseError, UserError
from scmdm.system.files import atomic_directory
from scmdm.system.lease import Fence, LeaseHolder, acquire, holder_lives, read_lease
from scmdm.system.untrusted import parse_as, read_json

T = TypeVar("T")
_SILENCE_LIMIT_S, _POLL_S, _LONGEST_POLL_S = 60.0, 0.5, 5.0


@dataclass(frozen=True)
class Task:
    """Unit of work. `run` writes the result into the empty directory that it is given.

    It is also given the fence of its lease, which it must require before it commits anything elsewhere.
    """

    name: str
    run: Callable[[Path, Fence], None]


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that share the tasks."""

    index: int = 0
    count: int = 1


def run_tasks(directory: Path, tasks: Sequence[Task], worker: Worker, on_progress: Callable[[int], None]) -> None:
    """Complete all tasks together with the other workers; a task's result is `directory/NAME`.

    Returns when every task has its result, or when `directory` is gone because another worker has finished everything.
    `on_progress` is called with the number of tasks known to be complete. Errors of a task propagate.
    """
    own = tasks[worker.index :: worker.count]
    names = {task.name for task in own}
    # Others' tasks from the end, because their owners start at the front.
    order = [*own, *(task for task in reversed(tasks) if task.name not in names)]
    leases, pause = _OthersLeases(), _POLL_S
    while order and directory.is_dir():
        waiting = []
        for tried, task in enumerate(order, start=1):
            if not _try_to_complete(directory, task, leases):
                waiting.append(task)
            on_progress(len(tasks) - len(order) + tried - len(waiting))
        pause = _POLL_S if len(waiting) < len(order) else min(1.5 * pause, _LONGEST_POLL_S)
        order = waiting
        if order:
            time.sleep(pause)


def read_result(path: Path, schema: type[T]) -> T:
    """Read a JSON file in the directory of a task's result.

    Raises UserError when it is damaged, and FileNotFoundError when another worker has removed all results.
    """
    remedy = f"remove {path.parent.parent} and start again"
    return parse_as(schema, read_json(path, "intermediate result", remedy=remedy), path, remedy)


class _OthersLeases:
    """When leases of other workers were last seen to be renewed. To ask for a lease writes files; to look does not."""

    def __init__(self) -> None:
        self._me = LeaseHolder.current()
        self._renewed: dict[Path, tuple[int, float]] = {}  # by generation: its time, and when that was seen

    def may_be_free(self, lease: Path) -> bool:
        """Return whether to ask for a lease: it may be free, or nothing is known about its holder yet."""
        path, holder = read_lease(lease)
        if path is None or holder is None or holder.released:
            return True
        if holder_lives(holder, self._me, ask_slurm=False) is False:
            return True
        try:
            time_ns = path.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        known = self._renewed.get(path)
        if known is None or known[0] != time_ns:
            self._renewed[path] = time_ns, time.monotonic()
            return known is None
        return time.monotonic() - known[1] > _SILENCE_LIMIT_S


def _try_to_complete(directory: Path, task: Task, leases: _OthersLeases) -> bool:
    """Make the task's result unless it exists; False while another worker works on it."""
    result = directory / task.name
    if result.is_dir():
        return True
    lease_directory = directory / f".{task.name}.lease"
    if not leases.may_be_free(lease_directory):
        return False
    try:
        # Do not query SLURM: hundreds of workers would, twice a second.
        with acquire(lease_directory, str(result), silence_limit_s=_SILENCE_LIMIT_S, ask_slurm=False) as lease:
            if not result.is_dir():
                with atomic_directory(result) as temporary:
                    task.run(temporary, lease.fence)
                    lease.fence.require()
    except InUseError:  # another worker holds it, or has taken it over
        return False
    except UserError:
        if directory.is_dir() and not result.is_dir():  # else another worker was faster
            raise
    return True
