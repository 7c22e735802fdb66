"""Work on many independent items, such as samples or held-out sequences, divided over the ranks of a job.

The result of an item must not depend on the rank that computes it. Results are kept in parts beside the output until it
is written, so that a job that was killed goes on, with any number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from scmdm.runtime.watchdog import report_progress, set_aside_stacks, watching_share
from scmdm.system.files import json_text, remove_tree
from scmdm.system.npz_files import read_npz, write_npz
from scmdm.system.process_group import World, gather_object, joined_world, on_rank_0

logger = logging.getLogger("scmdm")
T = TypeVar("T")
Columns = dict[str, np.ndarray]  # arrays with one row for each item
Result = tuple[Sequence[int], Columns]  # numbers of items, and their rows
_NUMBERS = "numbers"  # column of the items' numbers in a file
_MOST_FILES = 256  # of a rank; each costs a flush to the disk


@dataclass(frozen=True)
class ResultParts:
    """Files of finished items in a directory, of one kind of result.

    `key` holds everything that a result depends on; files of another key are left alone. Each file is complete or
    absent.
    """

    directory: Path
    key: Mapping[str, Any]

    @classmethod
    def beside(cls, out: Path, **key: Any) -> ResultParts:
        """Return the parts of the output file `out`, in a hidden directory beside it."""
        return cls(out.with_name(f".{out.name}.parts"), key)

    def of(self, **more: Any) -> ResultParts:
        """Return the parts of another result of the same job, which also depends on `more`."""
        return ResultParts(self.directory, {**self.key, **more})

    @property
    def prefix(self) -> str:
        """Beginning of the names of the files: a hash of the key."""
        return hashlib.sha256(json_text(dict(sorted(self.key.items()))).encode()).hexdigest()[:16]

    def write(self, numbers: Sequence[int], columns: Columns) -> None:
        """Write the results of items that no other file has."""
        path = self.directory / f"{self.prefix}-{numbers[0]:09d}.npz"
        write_npz(path, {_NUMBERS: np.array(numbers, np.int64), **columns})

    def read(self) -> Result:
        """Return the numbers of all finished items, and their results. Raises UserError for a damaged file."""
        files = sorted(self.directory.glob(f"{self.prefix}-*.npz"))
        found = [read_npz(path, f"remove {self.directory} to compute it again") for path in files]
        return _joined([(part.pop(_NUMBERS).tolist(), part) for part in found])

    def remove(self) -> None:
        """Remove the parts of all results of the job, after its output is written."""
        remove_tree(self.directory)


def share_of(items: Sequence[T], rank: int, size: int) -> Sequence[T]:
    """Return the items of a rank: consecutive ones, in numbers that differ by at most one."""
    return items[len(items) * rank // size : len(items) * (rank + 1) // size]


def compute_divided(
    total: int,
    compute: Callable[[Sequence[int]], Iterable[Result]],
    parts: ResultParts | None = None,
) -> Columns | None:
    """Return the results of items 0 ... total - 1, in this order, on rank 0; None on the other ranks.

    `compute` is called with the numbers of a rank's items, and yields results of some of them at a time, which `parts`
    keeps. Items that `parts` has already are not computed again. A watchdog ends a job with `parts` when a rank hangs.
    All ranks call this together.
    """
    rank, size = joined_world()
    done, kept = _kept_before(parts, total) if parts is not None else ([], {})
    finished = set(done)
    missing = [number for number in range(total) if number not in finished]
    share = share_of(missing, rank, size)
    watched = watching_share(parts.directory, World(rank, size, 0)) if parts is not None else contextlib.nullcontext()
    with watched:
        own = list(_kept(compute(share), parts, least=-(-len(share) // _MOST_FILES)))
    gathered = gather_object(own)
    if gathered is None:
        return None
    numbers, columns = _joined([(done, kept), *(part for of_rank in gathered for part in of_rank)])
    # Two jobs that write the same output may have computed an item twice, with the same result.
    every, order = np.unique(numbers, return_index=True)
    assert len(every) == total, f"{len(every)} results of {total}"
    return {name: values[order] for name, values in columns.items()}


def _kept_before(parts: ResultParts, total: int) -> Result:
    """Return the numbers of the items that earlier starts finished, and on rank 0 their results."""
    kept: Columns = {}

    def read() -> Sequence[int]:
        set_aside_stacks(parts.directory)
        done, found = parts.read()
        kept.update(found)
        if done:
            logger.warning("%d of %d results are from an earlier start, in %s", len(done), total, parts.directory)
        return done

    return on_rank_0(read), kept


def _kept(results: Iterable[Result], parts: ResultParts | None, *, least: int) -> Iterator[Result]:
    """Join results to at least `least` items each, write and yield them."""
    waiting: list[Result] = []
    for result in results:
        report_progress()
        waiting.append(result)
        if sum(len(numbers) for numbers, _ in waiting) >= least:
            yield _written(_joined(waiting), parts)
            waiting = []
    if waiting:
        yield _written(_joined(waiting), parts)


def _written(result: Result, parts: ResultParts | None) -> Result:
    if parts is not None:
        parts.write(*result)
    return result


def _joined(results: Sequence[Result]) -> Result:
    filled = [(numbers, columns) for numbers, columns in results if len(numbers)]
    numbers = [number for own, _ in filled for number in own]
    names = filled[0][1] if filled else {}
    return numbers, {name: np.concatenate([columns[name] for _, columns in filled]) for name in names}
