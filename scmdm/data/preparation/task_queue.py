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
from scmdm.system.lease import acquire
from scmdm.system.untrusted import parse_as, read_json

T = TypeVar("T")
_SILENCE_LIMIT_S, _POLL_S = 60.0, 0.5


@dataclass(frozen=True)
class Task:
    """Unit of work. `run` writes the result into the empty directory that it is given."""

    name: str
    run: Callable[[Path], None]


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
    while order and directory.is_dir():
        waiting = []
        for tried, task in enumerate(order, start=1):
            if not _try_to_complete(directory, task):
                waiting.append(task)
            on_progress(len(tasks) - len(order) + tried - len(waiting))
        order = waiting
        if order:
            time.sleep(_POLL_S)


def read_result(path: Path, schema: type[T]) -> T:
    """Read a JSON file in the directory of a task's result.

    Raises UserError when it is damaged, and FileNotFoundError when another worker has removed all results.
    """
    remedy = f"remove {path.parent.parent} and start again"
    return parse_as(schema, read_json(path, "intermediate result", remedy=remedy), path, remedy)


def _try_to_complete(directory: Path, task: Task) -> bool:
    """Make the task's result unless it exists; False while another worker works on it."""
    result = directory / task.name
    if result.is_dir():
        return True
    lease_directory = directory / f".{task.name}.lease"
    try:
        # Do not query SLURM: hundreds of workers would, twice a second.
        with acquire(lease_directory, str(result), silence_limit_s=_SILENCE_LIMIT_S, ask_slurm=False) as lease:
            if not result.is_dir():
                with atomic_directory(result) as temporary:
                    task.run(temporary)
                    lease.fence.require()
    except InUseError:  # another worker holds it, or has taken it over
        return False
    except UserError:
        if directory.is_dir() and not result.is_dir():  # else another worker was faster
            raise
    return True
