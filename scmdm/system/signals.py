"""The signals that ask a run to save and stop: none is lost, and none hurts the processes that help a run.

SLURM signals every process of a job step, not only the ranks: launcher, loader processes, wandb's service. What a run
needs for its last save must outlive that.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from scmdm.errors import UserError

REQUEUE_EXIT = 85  # stopped by a signal after saving: start the same command again to go on
VARIABLE = "SCMDM_STOP_SIGNALS"
_DEFAULT = "TERM,USR1,INT"


def stop_signals() -> frozenset[signal.Signals]:
    """Those that the environment names (`SCMDM_STOP_SIGNALS=TERM,USR2`), or SIGTERM, SIGUSR1 and SIGINT."""
    names = os.environ.get(VARIABLE, _DEFAULT)
    try:
        return frozenset(signal.Signals[f"SIG{name.strip().upper().removeprefix('SIG')}"] for name in names.split(","))
    except KeyError as error:
        raise UserError(f"{VARIABLE}={names}: {error} is no signal; give names such as {_DEFAULT}") from error


class StopRequest:
    """Remembers that a stop signal came; the loop acts at the end of the step. A second Ctrl-C interrupts.

    A launcher may start a process with these signals blocked, so that none is lost before the handlers are there.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._remember) for number in stop_signals()}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes that are started in the block never see a stop signal; this one sees it when the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_parent_only(_worker: int = 0) -> None:
    """For a loader process: only its rank may end it. It would take the rank along, with the save still to come."""
    wanted = stop_signals() | {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    threading.Thread(target=_wait_for_parent, args=(wanted,), name="signals", daemon=True).start()


def _wait_for_parent(wanted: frozenset[signal.Signals]) -> None:
    while True:
        found = signal.sigwaitinfo(wanted)
        if found.si_signo == signal.SIGTERM and found.si_pid == os.getppid():
            os._exit(0)
