"""Pools of worker processes, for jobs too small to use all cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

from scmdm.system.signals import REQUEUE_EXIT, end_with_parent

T = TypeVar("T")
_stopped = False  # in a worker: a stop signal has ended a job
MAX_WORKERS = 8  # each has torch in memory, about 0.7 GiB


def worker_count() -> int:
    """Return the number of jobs to run at once: `core_count`, or one if there is a GPU, which jobs would share."""
    return 1 if torch.cuda.is_available() else core_count()


def core_count() -> int:
    """Return the number of CPU jobs to run at once: torch's number of threads, at most `MAX_WORKERS`."""
    return min(torch.get_num_threads(), MAX_WORKERS)


@contextlib.contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    """Yield an executor of `count` processes whose standard output is discarded.

    When the block is left by an exception or by SIGTERM, workers get SIGTERM, which lets training jobs save, and are
    waited for. When this process is killed, the kernel kills them.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        children = multiprocessing.active_children()
        for child in children:
            child.terminate()
        for child in children:
            child.join()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def unless_stopped(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` in a worker, unless a stop signal has ended an earlier job: queued jobs must not start."""
    global _stopped
    if _stopped:
        raise SystemExit(REQUEUE_EXIT)
    try:
        return function(*arguments)
    except SystemExit:
        _stopped = True
        raise


def _start() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with_parent(parent=parent.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends the workers
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
