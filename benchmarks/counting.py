"""Counters of what a process does, from outside: bytes that it hashes and reads, its collectives, validated sequences.

The counted code is not changed: functions are wrapped in this process, before a command of scmdm runs in it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import resource
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor

from scmdm.models import tensor_files
from scmdm.models.network import Network
from scmdm.planner.activation_memory import LiveBytes
from scmdm.torch_private import TorchDispatchMode, storage_id, tree_leaves

MIB = 2**20


class HashedBytes:
    """Counts the bytes that SHA-256 is given, by `hashlib.sha256` and `hashlib.file_digest`."""

    def __init__(self) -> None:
        self.count = 0
        self._sha256, self._file_digest = hashlib.sha256, hashlib.file_digest
        hashlib.sha256 = self._new  # type: ignore[assignment]
        hashlib.file_digest = self._of_file

    def _new(self, data: Any = b"", **options: Any) -> Any:
        self.count += memoryview(data).nbytes
        return _Counted(self._sha256(data, **options), self)

    def _of_file(self, file: Any, digest: Any, /, **options: Any) -> Any:
        begin = file.seek(0, io.SEEK_CUR)
        found = self._file_digest(file, self._sha256 if digest == "sha256" else digest, **options)
        self.count += file.seek(0, io.SEEK_CUR) - begin
        return found


class _Counted:
    """A digest that counts; everything else is the digest's own."""

    def __init__(self, digest: Any, counter: HashedBytes) -> None:
        self._digest, self._counter = digest, counter

    def update(self, data: Any) -> None:
        self._counter.count += memoryview(data).nbytes
        self._digest.update(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._digest, name)


class Collectives(TorchDispatchMode):
    """Counts collectives of torch.distributed and the bytes of their largest tensor, in this thread.

    `all_bytes` are those of all their tensors: of a gather, one for each rank where it ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = self.all_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(function)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.count += 1
            self.bytes += max((tensor.nbytes for tensor in tensors), default=0)
            self.all_bytes += sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


class OpenedTensorFiles:
    """Counts openings of safetensors files, and the bytes of their headers, by this package and by safetensors."""

    def __init__(self) -> None:
        self.count = self.header_bytes = 0
        read, safe_open = tensor_files.read_header, safetensors.safe_open

        def reading(path: Path) -> Any:
            header = read(path)
            self.count += 1
            self.header_bytes += header.bytes
            return header

        def opening(filename: Any, *args: Any, **options: Any) -> Any:
            with open(filename, "rb") as file:
                self.header_bytes += 8 + int.from_bytes(file.read(8), "little")
            self.count += 1
            return safe_open(filename, *args, **options)

        tensor_files.read_header = reading
        safetensors.safe_open = opening  # type: ignore[misc, assignment]


class ValidatedSequences:
    """Counts the sequences whose loss is computed in eval mode, once per mode and draw, and notes the largest batch."""

    def __init__(self) -> None:
        self.count = self.largest = 0
        original = Network.weighted_nll

        @functools.wraps(original)
        def counted(model: Network, *args: Any, **options: Any) -> Any:
            if not model.training:
                state = args[0] if args else options["state"]
                self.count += len(state.z_BL)
                self.largest = max(self.largest, len(state.z_BL))
            return original(model, *args, **options)

        Network.weighted_nll = counted  # type: ignore[assignment, method-assign]


def bytes_read() -> int:
    """Bytes that this process has read through system calls so far; 0 where the system does not say."""
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("rchar:")), 0)


def peak_memory() -> int:
    """Peak bytes of memory: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def fake_ranks(size: int, rank: int = 0) -> Iterator[None]:
    """Make this process `rank` of `size` ranks, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def following_resizes(live: LiveBytes) -> Iterator[None]:
    """Count storages that FSDP2 frees and allocates again in place, too."""
    resize = torch.UntypedStorage.resize_

    def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        key = storage_id(storage)
        if live.follows(key) or size:
            known = live.follows(key)
            live.resize(key, size)
            if not known:
                weakref.finalize(storage, live.resize, key, 0)
        return result

    torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def watched(function: Callable[..., Any], before: Callable[[], object]) -> Callable[..., Any]:
    """Call `before` before each call of `function`."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        before()
        return function(*args, **options)

    return call


def rank() -> int:
    """This process's rank."""
    return int(os.environ.get("RANK", "0"))
