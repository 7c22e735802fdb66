"""Worker processes: on a CPU, two small jobs side by side are faster than one after the other on both cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

from scmdm.system.signals import REQUEUE_EXIT

T = TypeVar("T")
_stopped = False  # of this worker
_MOST = 8  # each has torch in memory, about 0.7 GiB


def worker_count() -> int:
    """Jobs at once: as many as torch would use threads; one where there is a GPU to share."""
    return 1 if torch.cuda.is_available() else core_count()


def core_count() -> int:
    """Jobs at once that need no GPU: as many as torch would use threads."""
    return min(torch.get_num_threads(), _MOST)


@contextlib.contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    """An executor of `count` silent processes. However the block is left, by SIGTERM too, none of them stays behind;
    those that train save first."""
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
    """In a worker: run it, unless a signal stopped an earlier job there: what waits in the queue must not start."""
    global _stopped
    if _stopped:
        raise SystemExit(REQUEUE_EXIT)
    try:
        return function(*arguments)
    except SystemExit:
        _stopped = True
        raise


def _start() -> None:
    """What a worker prints is in the files of its run; Ctrl-C is the parent's business, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _end_with_parent() -> None:
    """A parent that is killed outright cannot end its workers, which would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
