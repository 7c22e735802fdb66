"""Named tensors on disk, whole or sharded: torch's distributed checkpoint in the safetensors format.

Every rank writes its shards into one file of a directory. Readers, of any number of ranks, fetch the slices that they
need. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from scmdm.errors import UserError

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], *, group: dist.ProcessGroup | None = None) -> None:
    """Write tensors (plain or DTensor) into `directory`. All ranks of `group` (None: all ranks) call this together.

    Raises OSError when a rank cannot write.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        with _no_warnings():
            alone = not dist.is_initialized()
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    except CheckpointException as error:
        raise _cause(error) from error


def read_tensors(directory: Path, into: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill the tensors of `into` in place, however they are sharded.

    All ranks call this together, unless `alone`. Raises UserError when the directory is damaged or lacks a tensor.
    """
    try:
        reader = HuggingFaceStorageReader(str(directory))
        with _no_warnings():
            dcp.load(dict(into), storage_reader=reader, no_dist=alone or not dist.is_initialized())
    except CheckpointException as error:
        reason = " ".join(str(_cause(error)).split())[:200]
        raise UserError(f"{directory} cannot be read ({reason}); use another checkpoint") from error


def tensor_shapes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every tensor. Raises UserError when the directory is missing or damaged."""
    try:
        metadata = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory} cannot be read ({error}); use another checkpoint") from error
    tensors = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    return {name: (entry.size, entry.properties.dtype) for name, entry in tensors.items()}


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress torch's warning that a single process saves alone, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _cause(error: CheckpointException) -> Exception:
    """Return an OSError of any rank, such as a full disk, which explains the others; else all messages in one error."""
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause
    return RuntimeError("; ".join(map(str, causes)))
