"""One rank of a job: a command of scmdm, which a stop signal ends.

A launcher starts ranks with stop signals blocked. `train` and `adapt` unblock them when they can save. The other
commands have nothing to save, because what they write is complete or absent: a signal ends them at once.
"""

from __future__ import annotations

import os
import signal
import sys

from scmdm.errors import UserError
from scmdm.system.signals import end_with_parent, stop_signals

TRAINING = ("train", "adapt")


def rank_module(command: str) -> str:
    """Return the module that `python -m` runs for a rank of `command`."""
    return "scmdm" if command in TRAINING else "scmdm.launch.rank"


def main(arguments: list[str]) -> None:
    """Let stop signals end this process, and become the command."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    os.execv(sys.executable, [sys.executable, "-u", "-m", "scmdm", *arguments])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        sys.exit(f"scmdm: error: {mistake}")
