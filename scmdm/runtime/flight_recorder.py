"""NCCL's flight recorder: the recent collectives of every rank, written when a run hangs.

`torchfrtrace --prefix nccl_trace_rank_ RUN/stacks` compares the files of all ranks and names the collective that hangs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_PREFIX = "nccl_trace_rank_"
_PLACE, _EARLIER_PLACE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_OWN_PLACE = "SCMDM_FR_DUMP_TEMP_FILE"  # the value of _PLACE that scmdm has set; the user's is another, and is kept
_SWITCHES = (
    ("TORCH_NCCL_DUMP_ON_TIMEOUT", "", "1"),
    # End the process without aborting its communicators, which may hang: torch's default, but not torchrun's.
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING", "3"),
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),  # collectives
)


def recorder_environment(given: Mapping[str, str], directory: Path | None = None) -> dict[str, str]:
    """Return the variables that let NCCL record its recent collectives, and write them to `directory` at a timeout.

    Variables that a user has set in `given`, under their present or their earlier name, are left out.
    """
    found = {name: value for name, earlier, value in _SWITCHES if name not in given and earlier not in given}
    users = _EARLIER_PLACE in given or given.get(_PLACE) != given.get(_OWN_PLACE)
    if directory is not None and not users:
        found |= dict.fromkeys((_PLACE, _OWN_PLACE), str(directory.absolute() / _PREFIX))
    return found


def enable_flight_recorder() -> None:
    """Let NCCL record, in this process. It reads these variables when a process group is created."""
    os.environ.update(recorder_environment(os.environ))


@contextlib.contextmanager
def dumping_to(directory: Path) -> Iterator[None]:
    """Let NCCL write its record into `directory`, which holds the stacks, if it times out while the block runs.

    NCCL reads this variable when it writes.
    """
    before = {name: os.environ.get(name) for name in (_PLACE, _OWN_PLACE)}
    os.environ.update(recorder_environment(os.environ, directory))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def written_records(directory: Path) -> list[Path]:
    """List the records that ranks have written to `directory`."""
    return sorted(directory.glob(f"{_PREFIX}*"))


def dump_flight_recorder(directory: Path, rank: int) -> None:
    """Write this rank's record to `directory` now; do nothing without NCCL."""
    import torch  # the launcher needs the variables only
    import torch.distributed as dist

    from scmdm.torch_private import nccl_trace

    if dist.is_available() and dist.is_initialized() and torch.cuda.is_available():
        (directory / f"{_PREFIX}{rank}").write_bytes(nccl_trace())
