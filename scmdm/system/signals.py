"""Signals on which a run saves and stops, and child processes that end with their parent.

SLURM signals every process of a job step: ranks, launcher, loader processes, wandb's service. The processes that a run
needs for its last checkpoint must survive the stop signals; all of them must end when their parent does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from scmdm.errors import UserError

REQUEUE_EXIT = 85  # exit status: stopped by a signal after saving; the same command continues
STOP_SIGNALS_VARIABLE = "SCMDM_STOP_SIGNALS"
_DEFAULT = "TERM,USR1,INT"
_PR_SET_PDEATHSIG = 1


def stop_signals() -> frozenset[signal.Signals]:
    """Return the signals named by `SCMDM_STOP_SIGNALS`, as in `TERM,USR2`; by default SIGTERM, SIGUSR1 and SIGINT."""
    names = os.environ.get(STOP_SIGNALS_VARIABLE, _DEFAULT)
    try:
        found = frozenset(signal.Signals[f"SIG{name.strip().upper().removeprefix('SIG')}"] for name in names.split(","))
    except KeyError as error:
        raise UserError(
            f"{STOP_SIGNALS_VARIABLE}={names}: {error} is not a signal; give names such as {_DEFAULT}"
        ) from error
    if found & {signal.SIGKILL, signal.SIGSTOP}:
        raise UserError(f"{STOP_SIGNALS_VARIABLE}={names}: no process can catch KILL or STOP; give others")
    return found


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Let the kernel send this process `number` when its parent dies, however that happens (Linux; else no effect).

    `parent` is the parent's pid, if known: this process is signalled at once if the parent has died already. To the
    kernel the parent is the thread that created this process, which must therefore live as long as the parent process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


class StopRequest:
    """Context manager that records the first stop signal in `signal`; a second Ctrl-C raises KeyboardInterrupt.

    A launcher may start a process with these signals blocked, so that none is lost before the handlers are installed.
    A rank of torchrun also gets SIGTERM when torchrun dies: it saves and ends, instead of occupying the run directory.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._record) for number in stop_signals()}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Start processes in this block with stop signals blocked. This process receives pending ones after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(_worker: int = 0) -> None:
    """Make a loader process ignore stop signals, because its rank needs it until the end. The rank may send SIGTERM."""
    end_with_parent()
    ignored = stop_signals() | {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
    threading.Thread(target=_wait_for_parent, args=(ignored,), name="signals", daemon=True).start()


def _wait_for_parent(ignored: frozenset[signal.Signals]) -> None:
    while True:
        found = signal.sigwaitinfo(ignored)
        if found.si_signo == signal.SIGTERM and found.si_pid == os.getppid():
            os._exit(0)
