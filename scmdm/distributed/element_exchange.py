"""Move the elements of tensors from one division over the ranks to another; only what changes its rank is sent.

A division of a tensor of n elements over N ranks is a list of N + 1 bounds, from 0 to n: rank r holds the elements
`bounds[r]` to `bounds[r + 1]` of the flattened tensor.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_AT_ONCE = 2**24  # elements that a rank sends and receives in one collective, about


@dataclass(frozen=True)
class Move:
    """A tensor that changes its division."""

    held: list[int]  # bounds before
    wanted: list[int]  # bounds afterwards

    def to(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """Yield ranks, and begin and end of the elements that `rank` holds and each of them wants."""
        return _overlaps(self.held[rank], self.held[rank + 1], self.wanted)

    def back(self) -> Move:
        """Return the opposite move."""
        return Move(self.wanted, self.held)


def row_bounds(shape: torch.Size, ranks: int) -> list[int]:
    """Return the bounds of rows as `Shard(0)` of a DTensor divides them.

    Each rank has `ceil(rows / ranks)` of them, until none are left.
    """
    rows = shape[0]
    return range_bounds(shape.numel(), -(-rows // ranks) * (shape.numel() // rows), ranks)


def range_bounds(numel: int, size: int, ranks: int, *, offset: int = 0) -> list[int]:
    """Return the bounds of a tensor of `numel` elements from `offset` on, in a sequence with `size` per rank."""
    return [min(max(rank * size - offset, 0), numel) for rank in range(ranks)] + [numel]


def exchange(parts: Sequence[Tensor], moves: Sequence[Move]) -> Iterator[Tensor]:
    """Yield this rank's wanted part of every tensor, flat, for the held `parts`, which are flat, too.

    All ranks of the default group call this together, with the same moves. A result that is within the held part is a
    view of it. Besides the results, a rank has memory for a bounded number of elements.
    """
    ranks, done = dist.get_world_size(), 0
    while done < len(moves):
        sizes = itertools.accumulate(-(-move.held[-1] // ranks) for move in moves[done:])
        count = max(1, sum(1 for size in itertools.takewhile(lambda size: size <= _AT_ONCE, sizes)))
        yield from _exchange_at_once(parts[done : done + count], moves[done : done + count])
        done += count


def _exchange_at_once(parts: Sequence[Tensor], moves: Sequence[Move]) -> Iterator[Tensor]:
    rank = dist.get_rank()
    if all(move.held == move.wanted for move in moves):
        yield from parts
        return
    outgoing: dict[int, list[Tensor]] = {}
    for part, move in zip(parts, moves, strict=True):
        for other, begin, end in move.to(rank):
            outgoing.setdefault(other, []).append(part[begin - move.held[rank] : end - move.held[rank]])
    kept = iter(outgoing.pop(rank, ()))
    incoming = {other: iter(pieces) for other, pieces in _send(outgoing, parts[0], moves).items()}
    for move in moves:
        pieces = [next(kept if other == rank else incoming[other]) for other, *_ in move.back().to(rank)]
        yield pieces[0] if len(pieces) == 1 else torch.cat([parts[0].new_empty(0), *pieces])


def _send(outgoing: dict[int, list[Tensor]], like: Tensor, moves: Sequence[Move]) -> dict[int, tuple[Tensor, ...]]:
    """Send pieces to other ranks, and return those received by the rank that sent them, in the order of the moves."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths: dict[int, list[int]] = {}
    for move in moves:
        for other, begin, end in move.back().to(rank):
            if other != rank:
                lengths.setdefault(other, []).append(end - begin)
    sent_sizes = [sum(len(piece) for piece in outgoing.get(other, ())) for other in range(ranks)]
    received_sizes = [sum(lengths.get(other, ())) for other in range(ranks)]
    pieces = [piece for other in sorted(outgoing) for piece in outgoing[other]]
    sent = torch.cat(pieces) if pieces else like.new_empty(0)
    received = like.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sent_sizes)
    by_rank = received.split(received_sizes)
    return {other: by_rank[other].split(found) for other, found in lengths.items()}


def _overlaps(begin: int, end: int, bounds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield each rank with elements from `begin` to `end`, and where these begin and end."""
    rank = bisect.bisect_right(bounds, begin) - 1
    while begin < end:
        upto = min(end, bounds[rank + 1])
        if upto > begin:
            yield rank, begin, upto
        begin, rank = upto, rank + 1
