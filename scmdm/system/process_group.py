"""The processes of a run, and collectives outside of the training step.

Without torchrun, or another launcher that sets RANK and WORLD_SIZE, there is one process, and collectives return their
argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scmdm.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank of this process among the processes of the run."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine: index of its GPU

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes checkpoints, metrics and logs."""
        return self.rank == 0


def current_world() -> World:
    """Read the launcher's environment variables. Raises UserError if one of them is not a number."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)]
    try:
        rank, size, local_rank = map(int, values)
    except ValueError as error:
        found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise UserError(f"{found} are not all integers; start several processes with torchrun") from error
    return World(rank, size, local_rank)


@contextmanager
def process_group(
    world: World, device: torch.device, *, needed: bool, timeout: timedelta | None = None
) -> Iterator[None]:
    """Initialize torch.distributed while the block runs: with several processes, or with one if `needed`.

    `timeout` is the longest that a collective may take; None means torch's default.
    """
    if world.size == 1 and not needed:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
        barrier()  # a rank that leaves first would break connections that others still use
    finally:
        dist.destroy_process_group()


def joined_world() -> tuple[int, int]:
    """Return rank and number of the processes in the process group; (0, 1) without one, whatever the launcher says."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """Return every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def gather_object(value: T) -> list[T] | None:
    """Return every rank's value, in rank order, on rank 0; None on the other ranks."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box)
    return box


def all_reduce_max(value: int) -> int:
    """Return the maximum of the ranks' values."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
