"""The processes of a run, and collectives outside of the training step.

Without torchrun, or another launcher that sets RANK and WORLD_SIZE, there is one process, and collectives return their
argument.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from scmdm.errors import UserError
from scmdm.system.rank_heartbeat import RankHeartbeat, beating, meet
from scmdm.torch_private import default_group_timeout

T = TypeVar("T")
_ARRIVAL = timedelta(minutes=15)  # images are pulled and packages are read from slow file systems at a start
_ANSWER = timedelta(seconds=10)  # between rank 0 and the others


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


def machine_count() -> int:
    """Return the number of machines as streaming counts them: each has LOCAL_WORLD_SIZE of the processes."""
    name, size = "LOCAL_WORLD_SIZE", current_world().size
    try:
        return max(1, size // int(os.environ.get(name, "1")))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{name}={os.environ[name]} is not a positive integer; start processes with torchrun"
        ) from error


@contextmanager
def process_group(
    world: World,
    device: torch.device,
    *,
    needed: bool,
    timeout: timedelta | None = None,
    arrival: timedelta = _ARRIVAL,
    heartbeat: bool = False,
) -> Iterator[None]:
    """Initialize torch.distributed while the block runs: with several processes, or with one if `needed`.

    `timeout` is the longest that a collective may take, in groups that are created in the block, too; None means
    torch's default. Raises UserError, on every rank that is there, when a rank is missing after `arrival`.

    With `heartbeat`, the ranks meet before each collective of this module, and the first one waits for the last one as
    long as it lives (`RankHeartbeat`); `timeout` then does not include this wait.
    """
    if world.size == 1 and not needed:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    beats: AbstractContextManager[None] = nullcontext()
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        store = _meet(world, arrival)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        if heartbeat:
            beats = beating(RankHeartbeat(_connect(world, arrival, serve=False), world.rank, world.size))
    try:
        with beats, default_group_timeout(timeout) if timeout is not None else nullcontext():
            yield
            barrier()  # a rank that leaves first would break connections that others still use
    finally:
        dist.destroy_process_group()


def joined_world() -> tuple[int, int]:
    """Return rank and number of the processes in the process group; (0, 1) without one, whatever the launcher says."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _meet(world: World, arrival: timedelta) -> dist.Store:
    """Connect to the launcher's store and wait for all ranks.

    torch's own rendezvous waits for a number of ranks, and cannot say which one is missing.
    """
    from_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connect(world, arrival, serve=world.is_main and not from_launcher)
    _roll_call(store, world, arrival)
    return store


def _connect(world: World, arrival: timedelta, *, serve: bool) -> dist.Store:
    """Open a connection to the launcher's store, or to rank 0's, which serves it. Raises UserError."""
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "29500")
    try:
        server = dist.TCPStore(
            address,
            int(port),
            world.size,
            is_master=serve,
            timeout=arrival,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, ValueError) as error:
        raise UserError(
            f"rank {world.rank} of {world.size} cannot reach rank 0's store at MASTER_ADDR={address}, "
            f"MASTER_PORT={port}, within {arrival.total_seconds():.0f} s ({str(error).splitlines()[0]}); see whether "
            "rank 0 runs, and give every rank the same reachable address and a free port"
        ) from error
    return dist.PrefixStore(f"scmdm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)


def _roll_call(store: dist.Store, world: World, arrival: timedelta) -> None:
    """Wait until all ranks have come here. Raises UserError on each of them with the ranks that are missing.

    Rank 0 waits for all ranks and the others for rank 0, so that the store is asked a few times per rank.
    """
    store.set(f"arrived/{world.rank}", "")
    names = [f"arrived/{rank}" for rank in range(world.size)]
    if world.is_main:
        with suppress(dist.DistStoreError):
            store.wait(names, arrival)
        store.set("missing", ",".join(str(rank) for rank, name in enumerate(names) if not store.check([name])))
    try:
        store.wait(["missing"], arrival + _ANSWER)
        missing = store.get("missing").decode()
    except (dist.DistError, RuntimeError):  # rank 0 has never come, or has left
        missing = "0"
    store.set(f"left/{world.rank}", "")
    if not missing:
        return
    if world.is_main:  # its process may be the one that serves the store
        with suppress(dist.DistStoreError):
            there = set(range(world.size)) - set(map(int, missing.split(",")))
            store.wait([f"left/{rank}" for rank in sorted(there)], _ANSWER)
    raise UserError(
        f"rank(s) {missing} of {world.size} have not started within {arrival.total_seconds():.0f} s (this is rank "
        f"{world.rank} on {socket.gethostname()}); see their output, and start all ranks again"
    )


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        meet()
        dist.barrier()


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    meet()
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """Return every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    meet()
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def scatter(values: Sequence[T] | None) -> T:
    """Return to each rank its element of rank 0's `values`; the other ranks pass None."""
    if not dist.is_initialized():
        assert values is not None
        return values[0]
    meet()
    box: list[Any] = [None]
    dist.scatter_object_list(box, list(values) if values is not None else None, src=0)
    found: T = box[0]
    return found


def first_found(value: T | None) -> T | None:
    """Return the value of the lowest rank that has one, on every rank. If none has, this costs one small reduction."""
    if not dist.is_initialized():
        return value
    meet()
    ranks = dist.get_world_size()
    box = torch.tensor(ranks if value is None else dist.get_rank())
    dist.all_reduce(box, op=dist.ReduceOp.MIN)
    if int(box) == ranks:
        return None
    found = [value]
    dist.broadcast_object_list(found, src=int(box))
    return found[0]


def gather_object(value: T) -> list[T] | None:
    """Return every rank's value, in rank order, on rank 0; None on the other ranks."""
    if not dist.is_initialized():
        return [value]
    meet()
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box)
    return box


def all_reduce_max(value: int) -> int:
    """Return the maximum of the ranks' values."""
    if not dist.is_initialized():
        return value
    meet()
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
