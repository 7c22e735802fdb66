"""Named tensors on disk, whole or sharded: torch's distributed checkpoint in the safetensors format.

Every rank writes its shards into one file of a directory. Readers, of any number of ranks, fetch the slices that they
need. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from scmdm.errors import UserError
from scmdm.models.safetensors_headers import SUFFIX, Header, StoredTensor, read_header
from scmdm.system.untrusted import describe, parse_as, parse_json, reading

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
_SHARDING_INFO = "DCP_SHARDING_INFO"  # key of torch's distributed checkpoint in a file's metadata
_REMEDY = "use another checkpoint"


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Where a shard begins in its tensor."""

    saved_offsets: list[int]


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
        with reading(directory, "directory of tensors", _REMEDY), _no_warnings():
            reader = HuggingFaceStorageReader(str(directory))
            dcp.load(dict(into), storage_reader=reader, no_dist=alone or not dist.is_initialized())
    except CheckpointException as error:  # not an `Exception`
        raise UserError(f"{directory} cannot be read ({describe(_cause(error))}); {_REMEDY}") from error


def tensor_shapes(directory: Path) -> dict[str, StoredTensor]:
    """Describe every tensor, with its whole shape, from the headers of the files alone.

    Raises UserError when a file is damaged, or when the shards of a tensor do not make it up exactly.
    """
    with reading(directory, "directory of tensors", _REMEDY):
        files = sorted(path for path in directory.iterdir() if path.name.endswith(SUFFIX))
    shards: dict[str, list[tuple[tuple[int, ...], StoredTensor]]] = {}
    for path in files:
        header = read_header(path)
        offsets = _offsets(path, header)
        for name, tensor in header.tensors.items():
            shards.setdefault(name, []).append((offsets.get(name, (0,) * len(tensor.shape)), tensor))
    return {name: _whole(parts) for name, parts in shards.items()}


def _offsets(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    """Return where the shards of a file begin in their tensors; empty for a file of whole tensors."""
    written = header.metadata.get(_SHARDING_INFO)
    if not written:
        return {}
    where = f"{path}, {_SHARDING_INFO}"
    with reading(where, "description of shards", _REMEDY):
        content = parse_json(written)
    placed = parse_as(dict[str, _Placed], content, where)
    for name, tensor in header.tensors.items():
        if name not in placed or len(placed[name].saved_offsets) != len(tensor.shape):
            raise UserError(f"{where} does not place {name} of shape {tuple(tensor.shape)}; {_REMEDY}")
    return {name: tuple(part.saved_offsets) for name, part in placed.items()}


def _whole(parts: Sequence[tuple[tuple[int, ...], StoredTensor]]) -> StoredTensor:
    """Join the shards of a tensor. Raises UserError unless they have one dtype and cover it exactly once."""
    first = parts[0][1]
    if len(parts) == 1 and not any(parts[0][0]):
        return first
    files = ", ".join(sorted({part.file.name for _, part in parts})[:4])
    of_one = {(part.dtype_name, len(part.shape)) for _, part in parts}
    if len(of_one) > 1:
        raise UserError(
            f"{first.file.parent}: {first.name} has several dtypes or dimensions in {files}; remove the files that do "
            f"not belong to the model, or {_REMEDY}"
        )
    ends = [tuple(at + size for at, size in zip(begin, part.shape, strict=True)) for begin, part in parts]
    whole = torch.Size(max(column) for column in zip(*ends, strict=True))
    elements = sum(math.prod(part.shape) for _, part in parts)
    begins = {begin for begin, part in parts if math.prod(part.shape)}
    filled = sum(math.prod(part.shape) > 0 for _, part in parts)
    if elements != math.prod(whole) or len(begins) != filled or any(at < 0 for begin in begins for at in begin):
        raise UserError(
            f"{first.file.parent}: the shards of {first.name} in {files} do not make up a tensor of shape "
            f"{tuple(whole)}; {_REMEDY}"
        )
    return dataclasses.replace(first, shape=whole)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress torch's warning that a single process saves alone, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _cause(error: CheckpointException) -> BaseException:
    """Return an OSError of any rank, such as a full disk, which explains the others; else all messages in one error."""
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause
    return RuntimeError("; ".join(map(str, causes)))
