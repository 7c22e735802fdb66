"""Named tensors on disk, whole or sharded: torch's distributed checkpoint in the safetensors format.

Every rank writes its shards into one file of a directory. Readers, of any number of ranks, fetch the slices that they
need. Nothing is pickled.

torch's `HuggingFaceStorageReader` reads the files. Its writer is not used: it holds a rank's shards twice more in
memory, and plans a save with collectives whose size grows with the number of ranks. Which rank writes a replica follows
from names and placements, so that a save needs one gather, of the hashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from scmdm.errors import UserError
from scmdm.models.safetensors_headers import SUFFIX, Header, StoredTensor, read_header
from scmdm.models.safetensors_writer import write_file
from scmdm.system.hashing import FileHash
from scmdm.system.process_group import gather_object, joined_world, on_rank_0, scatter
from scmdm.system.untrusted import describe, parse_as, parse_json, reading

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
_SHARDING_INFO = "DCP_SHARDING_INFO"  # key of torch's distributed checkpoint in a file's metadata
_REMEDY = "use another checkpoint"


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Where a shard begins in its tensor."""

    saved_offsets: list[int]


def write_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    values: Mapping[str, Tensor] | None = None,
    before: Callable[[], None] = lambda: None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, FileHash]:
    """Write tensors (plain, the same on all ranks, or DTensors) into `directory`.

    All ranks of `group` (None: all ranks) call this together, with two small collectives. On rank 0 it returns the hash
    of every rank's file by name; elsewhere nothing. `values` holds this rank's part of each tensor if it is not to be
    read from `tensors`; `before` is called first, and may wait for them.

    Raises what this rank's part raised. On rank 0 it raises OSError when another rank failed, of any cause.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if world > 1 else 0
    written, failure = _Written(), None
    try:
        before()
        written = _write_part(directory, tensors, values, rank, world)
    except BaseException as error:  # noqa: BLE001 - the other ranks wait in the gather, and must learn of any failure
        written, failure = _Written(problem=f"rank {rank}: {describe(error)}"), error
    found = gather_object(written, group=group)
    if failure is not None:
        raise failure
    if found is None:
        return {}
    for part in found:
        if part.problem:
            raise OSError(errno.EIO, part.problem, str(directory))
    expected = sum(tensor.nbytes for tensor in tensors.values())
    if (total := sum(part.tensor_bytes for part in found)) != expected:
        raise OSError(errno.EIO, f"{len(found)} ranks wrote {total} bytes of tensors instead of {expected}")
    return {name: hashed for part in found for name, hashed in part.files.items()}


@dataclasses.dataclass(frozen=True)
class _Written:
    """What a rank has written."""

    files: dict[str, FileHash] = dataclasses.field(default_factory=dict)
    tensor_bytes: int = 0
    problem: str = ""


def _write_part(
    directory: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor] | None, rank: int, world: int
) -> _Written:
    own, offsets = {}, {}
    for number, name in enumerate(sorted(tensors)):
        if _is_ours(tensors[name], number, rank, world):
            value = (tensors if values is None else values)[name]
            own[name] = local_part(value)
            offsets[name] = {"saved_offsets": _offsets_of(name, tensors[name])}
    if not own:
        return _Written()
    name = f"shard-{rank + 1:05}-model-00001-of-00001{SUFFIX}"  # as torch names it
    directory.mkdir(exist_ok=True)
    metadata = {_SHARDING_INFO: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    hashed = write_file(directory / name, own, metadata)
    return _Written({name: hashed}, sum(value.nbytes for value in own.values()))


def _is_ours(tensor: Tensor, number: int, rank: int, world: int) -> bool:
    """Return whether this rank writes its part of the tensor: of replicas, the one that the tensor's number chooses."""
    if not isinstance(tensor, DTensor):
        return number % world == rank
    position, replicas, ours = 0, 1, 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    for place, size, at in zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True):
        assert place.is_shard() or place.is_replicate()
        if place.is_replicate():
            position, replicas = position * size + at, replicas * size
        elif not tensor.numel():
            ours += at  # a tensor without elements is written once
    return position == number % replicas and ours == 0 and (tensor.to_local().numel() > 0 or not tensor.numel())


def _offsets_of(name: str, tensor: Tensor) -> list[int]:
    """Return where this rank's part begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return [0] * tensor.dim()
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({name: tensor}, is_coordinator=True)
    (item,) = planner.create_local_plan().items
    assert item.tensor_data is not None
    return list(item.tensor_data.chunk.offsets)


def read_tensors(directory: Path, into: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill the tensors of `into` in place, however they are sharded.

    All ranks call this together, unless `alone`: they share the reading of headers, and each opens those files alone
    that hold something for it. Raises UserError when the directory is damaged or lacks a tensor.
    """
    alone = alone or joined_world()[1] == 1
    try:
        with reading(directory, "directory of tensors", _REMEDY), _no_warnings():
            metadata = None if alone else _own_metadata(directory, into)
            dcp.load(dict(into), storage_reader=_Reader(str(directory), metadata), no_dist=alone)
    except CheckpointException as error:  # not an `Exception`
        raise UserError(f"{directory} cannot be read ({describe(_cause(error))}); {_REMEDY}") from error


class _Reader(HuggingFaceStorageReader):
    """Reader that may know what the files hold; torch's own opens all of them on every rank to learn it."""

    def __init__(self, directory: str, known: Metadata | None) -> None:
        super().__init__(directory)
        self._known = known

    def read_metadata(self) -> Metadata:
        return self._known if self._known is not None else super().read_metadata()


_Shards = dict[str, list[tuple[tuple[int, ...], StoredTensor]]]  # where each begins in its tensor, by tensor
_Box = tuple[list[int], list[int]]  # begins and ends of a part of a tensor, by dimension
_Chunk = tuple[tuple[int, ...], torch.Size, str]  # where it begins in its tensor, its shape, name of its file
_Share = dict[str, tuple[torch.Size, list[_Chunk]]]  # a tensor's whole shape, and those chunks that a rank needs


def _own_metadata(directory: Path, into: Mapping[str, Tensor]) -> Metadata:
    """Return the description of those chunks that this rank's tensors overlap; all ranks call this together."""
    headers = _headers(directory, alone=False)
    wanted = gather_object({name: _box(name, tensor) for name, tensor in into.items()})
    share: _Share = scatter(None if wanted is None else _divide(_shards(headers), wanted))
    tensors: dict[str, STORAGE_TYPES] = {}
    places: dict[MetadataIndex, SimpleNamespace] = {}
    for name, (size, chunks) in share.items():
        found = [ChunkStorageMetadata(torch.Size(offsets), shape) for offsets, shape, _ in chunks]
        tensors[name] = TensorStorageMetadata(TensorProperties(), size, found)
        for offsets, _, file in chunks:  # torch's reader opens `relative_path`
            places[MetadataIndex(name, offsets)] = SimpleNamespace(relative_path=str(directory / file))
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Return the first row of this rank's part of a tensor, which consists of whole rows.

    `_offsets_of` would read values, which the fake tensors of a plan do not have.
    """
    if not isinstance(tensor, DTensor):
        return 0
    begin, rows, mesh = 0, tensor.shape[0], tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for place, ranks, at in zip(tensor.placements, mesh.shape, coordinate, strict=True):
        assert place.is_shard(0) or place.is_replicate()
        if place.is_shard():  # as `torch.chunk` divides what the dimensions before leave
            part = -(-rows // ranks)
            begin, rows = begin + min(at * part, rows), max(0, min(part, rows - at * part))
    return begin


def _box(name: str, tensor: Tensor) -> _Box:
    """Return where this rank's part of a tensor begins and ends."""
    local = local_part(tensor)
    begins = _offsets_of(name, tensor) if local.numel() else [0] * tensor.dim()
    return begins, [begin + size for begin, size in zip(begins, local.shape, strict=True)]


def _divide(shards: _Shards, wanted: Sequence[Mapping[str, _Box]]) -> list[_Share]:
    """Return for each rank the chunks that overlap its boxes; N ranks, M chunks, D dimensions."""
    shares: list[_Share] = [{} for _ in wanted]
    names = {part.file: part.file.name for parts in shards.values() for _, part in parts}
    for name, parts in shards.items():
        ranks = [rank for rank, boxes in enumerate(wanted) if name in boxes]
        if not ranks:
            continue
        begins_MD = np.array([begins for begins, _ in parts], np.int64)
        ends_MD = begins_MD + np.array([part.shape for _, part in parts], np.int64)
        box_begins_ND, box_ends_ND = (np.array([wanted[rank][name][i] for rank in ranks], np.int64) for i in (0, 1))
        overlap_NM = ((begins_MD < box_ends_ND[:, None]) & (ends_MD > box_begins_ND[:, None])).all(2)
        size = torch.Size(ends_MD.max(0).tolist())
        for rank in ranks:
            shares[rank][name] = size, []
        for row, number in zip(*(numbers.tolist() for numbers in np.nonzero(overlap_NM)), strict=True):
            begins, part = parts[number]
            shares[ranks[row]][name][1].append((begins, part.shape, names[part.file]))
    return shares


def tensor_shapes(directory: Path, *, alone: bool = True) -> dict[str, StoredTensor]:
    """Describe every tensor, with its whole shape, from the headers of the files alone.

    Unless `alone`, all ranks call this together. Raises UserError when a file is damaged, or when the shards of a
    tensor do not make it up exactly.
    """
    headers = _headers(directory, alone=alone)

    def join() -> dict[str, StoredTensor]:
        return {name: _whole(parts) for name, parts in _shards(headers).items()}

    return join() if alone else on_rank_0(join)


def used_ranges(directory: Path, names: Collection[str], *, alone: bool = True) -> dict[str, list[tuple[int, int]]]:
    """Return by file the ranges of bytes that a reader of the tensors `names` uses: all headers, and those tensors.

    Unless `alone`, all ranks call this together, and only rank 0 gets the ranges. Raises UserError when a header is
    damaged.
    """
    return {
        path.name: [(0, file.bytes), *((t.begin, t.end) for name, t in file.tensors.items() if name in names)]
        for path, file in _headers(directory, alone=alone).items()
    }


def iterate_tensors(directory: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors whole onto the CPU, one at a time, in the order of `names` and in their stored dtype.

    Only one tensor is in memory, and no file is mapped. Raises UserError when a file is damaged.
    """
    shards = _shards(_headers(directory))
    for name in names:
        parts = shards[name]
        whole = _whole(parts)
        tensor = torch.empty(whole.shape, dtype=whole.dtype)
        for offsets, part in parts:
            place = tensor[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape, strict=True))]
            if place.is_contiguous():
                _read_into(part, place)
            else:
                _read_into(part, columns := torch.empty(part.shape, dtype=part.dtype))
                place.copy_(columns)
        yield name, tensor


def _read_into(stored: StoredTensor, tensor: Tensor) -> None:
    """Read a tensor of a file into a contiguous one of its shape."""
    left = tensor.reshape(-1).view(torch.uint8).numpy().data
    with reading(stored.file, "safetensors file", _REMEDY), stored.file.open("rb", buffering=0) as file:
        file.seek(stored.begin)
        while len(left):
            count = file.readinto(left)
            if not count:
                raise EOFError(f"{stored.name} is incomplete")
            left = left[count:]


@dataclasses.dataclass(frozen=True)
class _Described:
    """Parsed header of a file, which ranks exchange instead of its text."""

    tensors: dict[str, StoredTensor]
    bytes: int  # before the first tensor
    offsets: dict[str, tuple[int, ...]]  # see `_offsets`


def _describe(path: Path) -> _Described:
    header = read_header(path)
    return _Described(header.tensors, header.bytes, _offsets(path, header))


def _headers(directory: Path, *, alone: bool = True) -> dict[Path, _Described]:
    """Read the headers of all files.

    Unless `alone`, each rank reads its share, and rank 0 gets all, the other ranks none; a problem is raised on all.
    """
    rank, ranks = (0, 1) if alone else joined_world()
    if ranks == 1:
        return {path: _describe(path) for path in _files(directory)}
    paths = on_rank_0(lambda: _files(directory))[rank::ranks]
    own: dict[Path, _Described] | UserError
    try:
        own = {path: _describe(path) for path in paths}
    except UserError as error:  # raised together with the other ranks, which wait in the gather
        own = error
    gathered = gather_object(own) or []

    def raise_first() -> None:
        for part in gathered:
            if isinstance(part, UserError):
                raise part

    on_rank_0(raise_first)
    return dict(sorted(item for part in gathered if isinstance(part, dict) for item in part.items()))


def _files(directory: Path) -> list[Path]:
    with reading(directory, "directory of tensors", _REMEDY):
        return sorted(path for path in directory.iterdir() if path.name.endswith(SUFFIX))


def _shards(files: Mapping[Path, _Described]) -> _Shards:
    found: _Shards = {}
    for file in files.values():
        for name, tensor in file.tensors.items():
            found.setdefault(name, []).append((file.offsets.get(name, (0,) * len(tensor.shape)), tensor))
    return found


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
