"""The processes of a run, and collectives outside of the training step.

Without torchrun, or another launcher that sets RANK and WORLD_SIZE, there is one process, and collectives return their
argument. Ranks may join several process groups, one after the other: those of a study train and evaluate in turn.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scmdm.errors import UserError
from scmdm.system.rank_heartbeat import RankHeartbeat, beating, meet
from scmdm.torch_private import default_group_timeout, forget_meshes

T = TypeVar("T")
_ARRIVAL = timedelta(minutes=15)  # images are pulled and packages are read from slow file systems at a start
_ANSWER = timedelta(seconds=10)  # between rank 0 and the others
_numbers = itertools.count()  # of the groups of this process: all ranks join the same ones in the same order
_servers: dict[tuple[str, int], dist.Store] = {}  # stores that this process serves until it ends
_destroy: Callable[[], None] = dist.destroy_process_group


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
    """Read the launcher's environment variables. Raises UserError unless they are those of one of several ranks."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)]
    found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    try:
        rank, size, local_rank = map(int, values)
    except ValueError as error:
        raise UserError(f"{found} are not all integers; start several processes with torchrun") from error
    if not (0 <= rank < size and local_rank >= 0):
        raise UserError(f"{found} is not a rank of {size}; unset these variables, or start processes with torchrun")
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

    With `heartbeat`, all ranks meet before each collective of this module that is of all, and the first one waits for
    the last one as long as it lives (`RankHeartbeat`); `timeout` then does not include this wait.

    A UserError or OSError that several ranks raise leaves the block on the first of them; the others exit with its
    status, so that a user reads it once.
    """
    if world.size == 1 and not needed:
        yield
        return
    global _destroy
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    beats: AbstractContextManager[None] = nullcontext()
    store: dist.Store | None = None
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        number = next(_numbers)
        if number > 0:
            forget_meshes()
        store = _meet(world, arrival, number)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        if heartbeat:
            own = _connect(world, arrival, number, serve=False)
            beats = beating(RankHeartbeat(own, world.rank, world.size))
    try:
        with beats, default_group_timeout(timeout) if timeout is not None else nullcontext():
            yield
            barrier()  # a rank that leaves first would break connections that others still use
    except (UserError, OSError) as error:
        if store is None or _is_first_to_tell(store, error):
            raise
        raise SystemExit(error.status if isinstance(error, UserError) else 1) from None
    finally:
        _destroy()
        _destroy = dist.destroy_process_group


def destroy_with(function: Callable[[], None]) -> None:
    """Let `function`, of a library with process groups of its own, destroy the present one."""
    global _destroy
    _destroy = function


def _is_first_to_tell(store: dist.Store, error: UserError | OSError) -> bool:
    """Return whether no other rank has raised the same error before."""
    try:
        return store.add(f"told/{hashlib.sha256(str(error).encode()).hexdigest()}", 1) == 1
    except (dist.DistError, RuntimeError):  # the rank that served the store has ended
        return True


def joined_world() -> tuple[int, int]:
    """Return rank and number of the processes in the process group; (0, 1) without one, whatever the launcher says."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _meet(world: World, arrival: timedelta, number: int) -> dist.Store:
    """Connect to the launcher's store and wait for all ranks to join the group `number`.

    torch's own rendezvous waits for a number of ranks, and cannot say which one is missing.
    """
    from_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connect(world, arrival, number, serve=world.is_main and not from_launcher)
    _roll_call(store, world, arrival)
    return store


def _connect(world: World, arrival: timedelta, number: int, *, serve: bool) -> dist.Store:
    """Open a connection to the launcher's store, or to rank 0's, which serves it. Raises UserError.

    Each group has its own keys in the store.
    """
    address, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "29500")
    if not port.isdecimal() or int(port) >= 2**16:
        raise UserError(f"MASTER_PORT={port} is not possible; it must be a number between 0 and {2**16 - 1}")
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
    except dist.DistError as error:
        raise UserError(
            f"rank {world.rank} of {world.size} cannot reach rank 0's store at MASTER_ADDR={address}, "
            f"MASTER_PORT={port}, within {arrival.total_seconds():.0f} s ({str(error).splitlines()[0]}); see whether "
            "rank 0 runs, and give every rank the same reachable address and a free port"
        ) from error
    if serve:
        # The other ranks may join the next group before this one has left the last.
        _servers.setdefault((address, int(port)), server)
    return dist.PrefixStore(f"scmdm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{number}", server)


def _roll_call(store: dist.Store, world: World, arrival: timedelta) -> None:
    """Wait until all ranks have arrived. Raises UserError, which names missing ranks, on all others.

    Rank 0 waits for all ranks and the others for rank 0, so that the store is asked a few times per rank.
    """
    store.set(f"arrived/{world.rank}", "")
    names = [f"arrived/{rank}" for rank in range(world.size)]
    if world.is_main:
        late: list[int] = []
        try:
            store.wait(names, arrival)
        except dist.DistStoreError:
            late = [rank for rank, name in enumerate(names) if not store.check([name])]
        store.set("missing", ",".join(map(str, late)))
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


def on_rank_0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone; return its result, or raise its UserError or OSError, on every rank."""
    found: T | UserError | OSError | None = None
    if joined_world()[0] == 0:
        try:
            found = function()
        except (UserError, OSError) as error:
            found = error
    result: Any = broadcast(found)
    if isinstance(result, UserError | OSError):
        raise result
    return cast(T, result)


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


def gather_object(value: T, *, group: dist.ProcessGroup | None = None) -> list[T] | None:
    """Return every rank's value, in rank order, on rank 0 of `group` (None: all ranks); None on the other ranks.

    The other ranks send their own value, padded to the size of the largest. torch's function gathers the sizes of all
    values on every rank.
    """
    if not dist.is_initialized():
        return [value]
    if group is None:
        meet()
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    size = torch.tensor(len(own))
    dist.all_reduce(size, op=dist.ReduceOp.MAX, group=group)
    padded = torch.zeros(int(size), dtype=torch.uint8)
    padded[: len(own)] = own
    gathered = _gather(padded, group)
    return None if gathered is None else [pickle.loads(part.numpy().tobytes()) for part in gathered]


def gather_numbers(values: Sequence[float]) -> list[list[float]] | None:
    """Return every rank's numbers, as many on each, in rank order, on rank 0; None on the other ranks."""
    if not dist.is_initialized():
        return [list(values)]
    meet()
    gathered = _gather(torch.tensor(values, dtype=torch.float64))
    return None if gathered is None else [part.tolist() for part in gathered]


def _gather(own: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor] | None:
    ranks = dist.get_world_size(group)
    box = [torch.empty_like(own) for _ in range(ranks)] if dist.get_rank(group) == 0 else None
    dist.gather(own, box, group=group, group_dst=0)
    return box


def all_reduce_max(value: int) -> int:
    """Return the maximum of the ranks' values."""
    if not dist.is_initialized():
        return value
    meet()
    box = torch.tensor(value)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
