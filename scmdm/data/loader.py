"""Read data sets: a streaming loader that resumes within an epoch, and whole splits in memory.

Legend: B batch, L length, N samples.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor

from scmdm.config.fields import require
from scmdm.data.dataset import TokenDataset, TokenStream
from scmdm.data.manifest import Manifest, remote_of
from scmdm.data.mixture import DataMixture
from scmdm.data.mosaic_streaming import StreamingDataLoader
from scmdm.data.remote import fetch_index
from scmdm.data.shard_files import prepare_shards
from scmdm.data.shard_index import COLUMN, LABEL, OPTIONAL_COLUMNS, ShardIndex, ShardInfo, find_wrong_value, read_index
from scmdm.data.shard_reader import ShardReader
from scmdm.errors import UserError
from scmdm.system.process_group import machine_count
from scmdm.system.signals import ignore_stop_signals, stop_signals_blocked
from scmdm.system.untrusted import describe, reading

_CANONICAL_NODES = 64
_SHUFFLE_BLOCK = 1 << 18  # samples; fixed, because streaming's default depends on the number of nodes


def build_loader(
    data: DataMixture,
    split: str,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    num_canonical_nodes: int = 1,
    num_workers: int = 0,
    cache_limit: str | None = None,
    shuffle_block: int | None = None,
    replication: int = 1,
) -> StreamingDataLoader:
    """Make the loader of this rank's batches, `{"tokens": int64 (B, L), "index": int64 (B,)}`.

    The order depends on `seed`, the epoch, the data and `num_canonical_nodes`, not on the number of ranks. Its
    `state_dict` and `load_state_dict` (before the first batch) resume within an epoch. An epoch of several streams has
    as many samples as all of them together, drawn in their proportions.

    Args:
        data: data sets.
        split: split of each.
        batch_size: sequences per batch of a rank.
        shuffle: shuffle the samples.
        seed: seed of the order.
        drop_last: drop an incomplete last batch.
        num_canonical_nodes: fixes the order for any number of nodes.
        num_workers: loader processes per rank.
        cache_limit: size such as 10gb, beyond which shards are removed from the caches.
        shuffle_block: number of consecutive samples that are shuffled together.
        replication: number of consecutive ranks that receive the same batches.

    Raises:
        UserError: the data set is smaller than a batch or damaged, or a limited cache is in use.
    """
    places = ", ".join(str(stream.root / split) for stream in data.streams)
    samples, _ = _samples_and_shards(data, split)
    batch = batch_size * int(os.environ.get("WORLD_SIZE", "1")) // replication
    _check_sizes(samples, places, batch if drop_last else 1, num_canonical_nodes)
    claims = _claim_caches(data) if cache_limit is not None else []
    options = {
        "streams": [TokenStream(stream, split) for stream in data.streams],
        "batch_size": batch_size,
        "shuffle": shuffle,
        "shuffle_seed": seed % 2**32,
        "shuffle_algo": "py1e",
        "shuffle_block_size": shuffle_block or _SHUFFLE_BLOCK,
        # Streaming draws the samples of a weighted epoch in a Python loop, this number at a time.
        "sampling_granularity": max(1, samples >> 20),
        "num_canonical_nodes": num_canonical_nodes,
        "predownload": 8 * batch_size,
        "cache_limit": cache_limit,
        "replication": replication if replication > 1 else None,
    }
    dataset = _construct(options, places)
    loader = StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        drop_last=drop_last,
        collate_fn=dataset.collate,
        worker_init_fn=ignore_stop_signals,
    )
    for claim in claims:
        weakref.finalize(loader, claim.release)
    return loader


def _check_sizes(samples: int, places: str, needed: int, nodes: int) -> None:
    """Raise UserError unless there are enough samples for a batch and for the canonical nodes."""
    if samples < needed:
        raise UserError(f"{places} has {samples} samples, fewer than a batch of {needed}; lower the batch size")
    machines, key = machine_count(), "data.num_canonical_nodes"
    require(nodes <= samples, key, nodes, f"at most the {samples} samples of {places}")
    even = nodes % machines == 0 or machines % nodes == 0
    require(even, key, nodes, f"a multiple or a divisor of {machines} machines")


def canonical_nodes(data: DataMixture, split: str, machines: int) -> int:
    """Return the number of canonical nodes with which machines fetch different shards of remote data, else 1.

    It is `machines`, doubled while it stays within `_CANONICAL_NODES`, so that a later start may have more of them, and
    within a sixteenth of the shards: two canonical nodes may share a shard, which two machines then fetch.
    """
    if machines == 1 or all(remote_of(stream.root) is None for stream in data.streams):
        return 1
    _, shards = _samples_and_shards(data, split)
    found = machines
    while 2 * found <= min(_CANONICAL_NODES, shards // 16):
        found *= 2
    return found


def shuffle_block_of(data: DataMixture, split: str, nodes: int) -> int:
    """Return the samples that each canonical node shuffles together: a share of the usual block, or else two shards."""
    samples, shards = _samples_and_shards(data, split)
    return max(_SHUFFLE_BLOCK // nodes, 2 * -(-samples // shards))


def _samples_and_shards(data: DataMixture, split: str) -> tuple[int, int]:
    splits = [stream.manifest.split(split, stream.root) for stream in data.streams]
    return sum(found.samples for found in splits), sum(len(found.files) - 1 for found in splits)  # without the index


def _construct(options: dict[str, Any], places: str) -> TokenDataset:
    # Python's shared-memory tracker starts here; it must outlive stop signals.
    with warnings.catch_warnings(), stop_signals_blocked(), reading(places, "data set"):
        # Streaming warns about local directories without a remote, which are intended.
        warnings.simplefilter("ignore")
        try:
            dataset = TokenDataset(**options)
        except ValueError as error:
            if options["cache_limit"] is None:
                raise
            raise UserError(f"data.cache_limit={options['cache_limit']} is not possible: {describe(error)}") from error
        atexit.register(_remove_lock_files, dataset.lock_files, os.getpid())
        return dataset


def _remove_lock_files(paths: Sequence[Path], process: int) -> None:
    """Remove the files of streaming's locks, which it leaves, at the end of the process that made them."""
    if os.getpid() == process:  # forked processes inherit what is registered
        for path in paths:
            path.unlink(missing_ok=True)


def _claim_caches(data: DataMixture) -> list[FileLock]:
    """Lock size-limited caches: runs would remove each other's shards."""
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return []
    claims = [FileLock(stream.root / ".limit.lock", timeout=0, thread_local=False) for stream in data.streams]
    for claim, stream in zip(claims, data.streams, strict=True):
        try:
            claim.acquire()
        except Timeout as error:
            raise UserError(
                f"{stream.key}={stream.root} is the limited cache of another run; give each run its own directory, or "
                "leave data.cache_limit out of both"
            ) from error
    return claims


def epochs(
    loader: StreamingDataLoader, global_batch_size: int, state: dict[str, Any] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's share of every whole global batch, for endless epochs, beginning at a loader's `state`.

    The remainder of an epoch after its last whole batch is not used: streaming pads the shares of the ranks with
    repeated samples, which for some numbers of ranks would form another batch.

    Raises UserError when a shard disappears, which ends streaming's iterator early without an error.
    """
    dataset: Any = loader.dataset
    if state is not None:
        if dataset.epoch_size - state["sample_in_epoch"] < global_batch_size:
            state = {**state, "epoch": state["epoch"] + 1, "sample_in_epoch": 0}
        loader.load_state_dict(state)
    used = state["sample_in_epoch"] if state is not None else 0
    while True:
        expected, found = (dataset.epoch_size - used) // global_batch_size, 0
        with _without_traceback():
            for batch in itertools.islice(loader, expected):
                found += 1
                yield batch
        if found < expected:
            dataset.explain_early_end()
        used = 0


@contextlib.contextmanager
def _without_traceback() -> Iterator[None]:
    """Remove the traceback that torch adds to the message of a UserError from a loader process."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


def read_split(root: Path, split: str, rows: Sequence[int] | None = None) -> np.ndarray:
    """Read the ids (N, L) of a split in their stored dtype, all or those of `rows` (ascending).

    In a cache, missing files of the split are fetched. Raises UserError when a file is missing or damaged.
    """
    found = _read(root, split, rows, (COLUMN,))
    manifest = Manifest.read(root)
    return found[COLUMN] if COLUMN in found else np.zeros((0, manifest.length), manifest.dtype)


def read_labels(root: Path, split: str) -> np.ndarray:
    """Read the labels int32 (N,) of a split, indices into the manifest's `labels`.

    Raises UserError when the data set has no labels, and when a file is missing or damaged.
    """
    if not Manifest.read(root).labels:
        raise UserError(f"{root} has no labels; prepare it from a source with labels")
    found = _read(root, split, None, (LABEL,))
    return found[LABEL].astype(np.int32) if LABEL in found else np.zeros(0, np.int32)


def read_columns(root: Path, split: str, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Read the columns of some rows (ascending) as in a loader's batch, int64, without `index`. Raises UserError."""
    found = _read(root, split, rows, (COLUMN, *OPTIONAL_COLUMNS))
    return {name: values.astype(np.int64) for name, values in found.items()}


def _read(root: Path, split: str, rows: Sequence[int] | None, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the given columns, each as an array over the rows; fetch and decompress the shards that have the rows."""
    fetch_index(root, split)
    manifest = Manifest.read(root)
    wanted = range(manifest.split(split, root).samples) if rows is None else rows
    remedy = f"check it with `scmdm prepare --verify {root}`"
    places = list(_places(read_index(root, split, manifest), wanted))
    prepare_shards(root, split, [shard for shard, _ in places])
    found: list[dict[str, np.ndarray]] = []
    for shard, own in places:
        with reading(root / split / shard.raw_data.basename, "shard", remedy):
            found.append(_columns(ShardReader(root, split, shard), own, names))
    columns = {name: np.concatenate([part[name] for part in found]) for name in (found[0] if found else ())}
    wrong = find_wrong_value(columns, manifest, len(manifest.labels))
    if wrong is not None:
        raise UserError(f"cannot read sample {wanted[wrong.row]} of {root / split}: {wrong.reason}; {remedy}")
    return columns


def _columns(reader: ShardReader, rows: list[int], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read those of the given columns that a shard has, at once if all of its rows are wanted."""
    if rows == list(range(reader.samples)):
        return {name: values for name, values in reader.read_all().items() if name in names}
    samples = [reader[row] for row in rows]
    return {name: np.array([sample[name] for sample in samples]) for name in names if name in samples[0]}


def _places(index: ShardIndex, wanted: Sequence[int]) -> Iterator[tuple[ShardInfo, list[int]]]:
    """Yield the shards that have rows of `wanted` (ascending), with the rows counted from the shard's first."""
    first = begin = 0
    for shard in index.shards:
        end = bisect_left(wanted, first + shard.samples)
        if end > begin:
            yield shard, [row - first for row in wanted[begin:end]]
        first, begin = first + shard.samples, end


def spread_rows(samples: int, wanted: int) -> list[int]:
    """Return evenly spaced indices of `wanted` rows (all if there are fewer), because a split may be sorted."""
    return np.unique(np.linspace(0, samples - 1, min(wanted, samples)).round().astype(int)).tolist()
