"""Verify a checkpoint or export on all ranks together, which agree on the result.

Rank 0 reads the seal and compares names and sizes. With `verify=share` every rank hashes about `1 / N` of the bytes
that are used, in whole chunks of files; the headers of tensors' files, which say what is used, are read by all ranks,
each its share. With `verify=full`, and of descriptions alone, rank 0 hashes while the others wait. One reduction tells
whether a rank has found a problem; if so, all ranks have it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scmdm.checkpoint.seal import Seal, SealedPart, find_wrong_files, find_wrong_part, read_seal
from scmdm.errors import UserError
from scmdm.models.model_files import used_bytes
from scmdm.models.safetensors_headers import SUFFIX
from scmdm.observability.progress_bar import count_up
from scmdm.system.process_group import broadcast, first_found, joined_world, scatter

_SHOWN_FROM = 2**30  # bytes of a share whose progress is shown
_MIB = 2**20


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
    beat: Callable[[str], object] = lambda _part: None


ALONE = Verification()


def first_problem(path: Path, how: Verification = ALONE, *, needed: Collection[str] = ()) -> str | None:
    """Return a problem of a model directory that names the file, the same on all ranks; None if it is undamaged.

    `needed` files must be among those that the seal lists. All ranks call this together if `how.together` is set.
    """
    rank, ranks = joined_world() if how.together else (0, 1)
    found, problem = _sealed(path, needed) if rank == 0 else (None, None)
    problem = problem if ranks == 1 else broadcast(problem)
    if problem is not None:
        return problem
    used = None
    if how.mode == "share" and how.weights is not None:
        try:
            used = used_bytes(path, weights=how.weights, alone=ranks == 1)
        except UserError as error:  # the same on all ranks
            return str(error)
    shares = None
    if found is not None:
        shares = balance(_parts(found, how, used), ranks if how.mode == "share" else 1, ranks)
    own = scatter(shares) if ranks > 1 else (shares or [[]])[0]
    problem = _hash(path, own, how, shown=rank == 0)
    return first_found(problem) if ranks > 1 else problem


def _sealed(path: Path, needed: Collection[str]) -> tuple[Seal | None, str | None]:
    """Return the seal, or the problem that it, names or sizes show."""
    try:
        found = read_seal(path)
        problem = next((text for _, text in find_wrong_files(path, found, needed)), None)
    except UserError as error:
        return None, str(error)
    return found, problem


_Ranges = Mapping[str, Sequence[tuple[int, int]]]  # of bytes, by file


def _parts(found: Seal, how: Verification, used: _Ranges | None) -> list[SealedPart]:
    """Return what must be hashed: everything, or the small files and the chunks of tensors that are used."""
    if how.mode == "sizes":
        return []
    parts = [part for name in found.files for part in found.parts(name)]
    if how.mode == "descriptions":
        return [part for part in parts if not part.name.endswith(SUFFIX)]
    if used is None:
        return parts
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


def _hash(path: Path, parts: Sequence[SealedPart], how: Verification, *, shown: bool) -> str | None:
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
