"""Verify a checkpoint or export on all ranks together: each hashes its share of what is used, and all agree.

Rank 0 reads the seal and compares names and sizes. Then every rank hashes about `1 / N` of the bytes, in whole chunks
of files. One reduction tells whether a rank has found a problem; if so, all ranks have it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from scmdm.checkpoint.seal import Seal, SealedPart, find_wrong_files, find_wrong_part, read_seal
from scmdm.errors import UserError
from scmdm.models.model_files import used_bytes
from scmdm.models.safetensors_headers import SUFFIX
from scmdm.observability.progress_bar import count_up
from scmdm.system.process_group import first_found, joined_world, scatter

_SHOWN_FROM = 2**30  # bytes of a share whose progress is shown
_MIB = 2**20


def _ignore(_part: str) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Verification:
    """How a model directory is verified before it is used.

    `mode` is the value of the key `verify`, or "descriptions" to hash all files but tensors. With `weights`, "ema" or
    "raw", only what a reader of these weights uses is hashed. With `together` all ranks take part; otherwise this
    process verifies alone. `beat` is a watchdog's.
    """

    mode: str = "full"
    weights: str | None = None
    together: bool = False
    beat: Callable[[str], None] = _ignore


ALONE = Verification()


@dataclass(frozen=True)
class _Work:
    """A problem that rank 0 has found, or else what a rank has to hash."""

    problem: str | None = None
    parts: tuple[SealedPart, ...] = ()


def first_problem(path: Path, how: Verification = ALONE, *, needed: Collection[str] = ()) -> str | None:
    """Return a problem of a model directory that names the file, the same on all ranks; None if it is undamaged.

    `needed` files must be among those that the seal lists. All ranks call this together if `how.together` is set.
    """
    rank, ranks = joined_world() if how.together else (0, 1)
    main = rank == 0
    shares = _divide(path, how, needed, ranks) if main else None
    own = scatter(shares) if ranks > 1 else (shares or [_Work()])[0]
    if own.problem is not None:
        return own.problem
    problem = _hash(path, own.parts, how, shown=main)
    return first_found(problem) if ranks > 1 else problem


def _divide(path: Path, how: Verification, needed: Collection[str], ranks: int) -> list[_Work]:
    """Return each rank's work, or the problem that names and sizes show."""
    try:
        found = read_seal(path)
        problem = next((text for _, text in find_wrong_files(path, found, needed)), None)
        parts = [] if problem is not None or how.mode == "sizes" else _parts(path, found, how)
    except UserError as error:
        problem, parts = str(error), []
    if problem is not None:
        return [_Work(problem)] * ranks
    return [_Work(None, tuple(share)) for share in balance(parts, ranks if how.mode == "share" else 1, ranks)]


def _parts(path: Path, found: Seal, how: Verification) -> list[SealedPart]:
    """Return what must be hashed: everything, or the small files and the chunks of tensors that are used."""
    parts = [part for name in found.files for part in found.parts(name)]
    if how.mode == "descriptions":
        return [part for part in parts if not part.name.endswith(SUFFIX)]
    if how.mode == "full" or how.weights is None:
        return parts
    used = used_bytes(path, weights=how.weights)
    return [part for part in parts if not part.name.endswith(SUFFIX) or _overlaps(part, used.get(part.name, ()))]


def _overlaps(part: SealedPart, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(begin < part.end and part.begin < end for begin, end in ranges)


def balance(parts: Iterable[SealedPart], hashing: int, ranks: int) -> list[list[SealedPart]]:
    """Divide parts over the first `hashing` of `ranks` ranks, the largest first to the rank with the fewest bytes."""
    shares: list[list[SealedPart]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(hashing)]
    for part in sorted(parts, key=lambda part: part.begin - part.end):
        size, rank = loads[0]
        heapq.heapreplace(loads, (size + part.end - part.begin, rank))
        shares[rank].append(part)
    for share in shares:
        share.sort(key=lambda part: (part.name, part.begin))  # files are read from front to back
    return shares


def _hash(path: Path, parts: tuple[SealedPart, ...], how: Verification, *, shown: bool) -> str | None:
    """Hash parts until one is wrong; returns its problem."""
    total = sum(part.end - part.begin for part in parts)
    with count_up(f"verifying {path} (MiB)", max(1, total // _MIB), shown=shown and total >= _SHOWN_FROM) as advance:
        rest = 0

        def on_bytes(count: int) -> None:
            nonlocal rest
            how.beat("start")
            done, rest = divmod(rest + count, _MIB)
            if done:
                advance(done)

        return next(filter(None, (find_wrong_part(path, part, on_bytes) for part in parts)), None)
