"""The lease of a run directory: one run at a time writes into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from scmdm.checkpoint.retention import remove_leftovers
from scmdm.errors import UserError
from scmdm.observability.run_metrics import logger
from scmdm.system.lease import Fence, Lease, acquire
from scmdm.system.process_group import on_rank_0
from scmdm.system.run_directory import LEASE


@contextlib.contextmanager
def acquire_run(directory: Path) -> Iterator[Lease]:
    """Create the run directory and hold its lease while the block runs.

    Raises InUseError, which names the holder, if another run holds it, and UserError if it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run_dir={directory} cannot be created ({error.strerror}); choose a directory that you may write to"
        ) from error
    with acquire(directory / LEASE, f"run_dir={directory}") as lease:
        if lease.predecessor is not None:
            logger.warning("run_dir=%s: taking over from %s, which has died", directory, lease.predecessor)
        # A suspended predecessor that resumes between its check and its rename must find nothing to rename.
        remove_leftovers(directory)
        yield lease


@contextlib.contextmanager
def acquire_run_on_rank_0(directory: Path) -> Iterator[Fence]:
    """Call `acquire_run` on rank 0 and yield its fence on all ranks. All ranks raise if rank 0 is refused."""
    with contextlib.ExitStack() as stack:
        yield on_rank_0(lambda: stack.enter_context(acquire_run(directory)).fence)
