"""NCCL's flight recorder: the recent collectives of every rank, written when a run hangs.

`torchfrtrace --prefix nccl_trace_rank_ RUN/stacks` compares the files of all ranks and names the collective that hangs.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from scmdm.torch_private import nccl_trace

_PREFIX = "nccl_trace_rank_"


def enable_flight_recorder(directory: Path) -> None:
    """Let NCCL record its recent collectives, and write them to `directory` when one of them times out.

    Call this before the process group is created. Environment variables that the user has set are kept.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name, earlier_name, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),  # collectives
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(directory.absolute() / _PREFIX)),
    ):
        if earlier_name not in os.environ:
            os.environ.setdefault(name, value)


def written_records(directory: Path) -> list[Path]:
    """List the records that ranks have written to `directory`."""
    return sorted(directory.glob(f"{_PREFIX}*"))


def dump_flight_recorder(directory: Path, rank: int) -> None:
    """Write this rank's record to `directory` now; do nothing without NCCL."""
    if dist.is_available() and dist.is_initialized() and torch.cuda.is_available():
        (directory / f"{_PREFIX}{rank}").write_bytes(nccl_trace())
