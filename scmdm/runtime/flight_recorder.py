"""NCCL's flight recorder: the recent collectives of every rank, written when a run hangs.

`torchfrtrace --prefix nccl_trace_rank_ RUN/stacks` compares the files of all ranks and names the collective that hangs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_PREFIX = "nccl_trace_rank_"


def recorder_environment(directory: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let NCCL record its recent collectives, and write them to `directory` at a timeout.

    Variables that are set in `given`, under their present or their earlier name, are left out.
    """
    wanted = (
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "", "1"),
        # End the process without aborting its communicators, which may hang: torch's default, but not torchrun's.
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING", "3"),
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),  # collectives
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(directory.absolute() / _PREFIX)),
    )
    return {name: value for name, earlier, value in wanted if name not in given and earlier not in given}


def enable_flight_recorder(directory: Path) -> None:
    """Set the variables of `recorder_environment` in this process, before its process group is created."""
    os.environ.update(recorder_environment(directory, os.environ))


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
