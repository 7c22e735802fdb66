"""Samples out of one or several sharded data sets, by streaming's machinery.

What is added to it: an id of its own for every repetition of a sample, shards fetched and verified by
`scmdm.data.remote`, and errors that reach the reader with the file's name instead of ending the epoch in silence.

Legend: L length, N samples.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from scmdm.data.manifest import check_dataset, remote_of
from scmdm.data.mixture import Source
from scmdm.data.mosaic_streaming import Reader, ShardState, Stream, StreamingDataset
from scmdm.data.remote import fetch
from scmdm.data.shard_reader import ShardReader
from scmdm.errors import UserError

COLUMN, LABEL = "tokens", "label"
DOCUMENTS = "documents"  # of packed samples: the number of each token's document within the sample
GIVEN = "given"  # number of leading tokens that are never masked: [BOS] and a prompt
MORE = (DOCUMENTS, GIVEN, LABEL)  # columns that not all data sets have
_UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, IndexError)


class TokenStream(Stream):
    """A split of one data set. Shards that its directory lacks come from the remote data set that it is a cache of.

    Streaming is not told of that one: its own download leaves a damaged shard in the cache under the shard's name,
    where the next attempt takes it for good, and it refuses a directory that a killed run has left in shared memory.
    """

    def __init__(self, source: Source, split: str) -> None:
        super().__init__(local=str(source.root.resolve()), split=split, proportion=source.proportion)
        self.origin = remote_of(source.root)
        self._files = {file.file: file for file in source.manifest.split(split, source.root).files}

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Reader]:
        """The readers of the split's shards, faster ones than streaming's."""
        return [_faster(reader) for reader in super().get_shards(world, allow_unsafe_types)]

    def prepare_shard(self, shard: Reader) -> int:
        """Make a shard's files local; returns how many bytes the directory grew by."""
        if self.origin is None:
            return super().prepare_shard(shard)
        names = [f"{self.split}/{raw.basename}" for raw, _ in shard.file_pairs]
        return sum(fetch(Path(self.local), self.origin, self._files[name]) for name in names)


class TokenDataset(StreamingDataset):
    """Samples `{"tokens": int64 (L,), "index": int}`, where all noise is keyed on `index`.

    Those of packed data have `documents` (L,), those with prompts `given` (), those with classes `label` ().

    It is the sample's place in its split, counted through all streams. A stream that is drawn more than once in an
    epoch gives a repeated sample another index each time (more by a multiple of all samples): else two copies in one
    batch would get the same masks.
    """

    streams: list[TokenStream]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spanner: Any = _Spans(self.samples_per_shard)
        self._failure: UserError | None = None  # of a reading thread
        self._found: set[int] = set()  # shards that this process has prepared before

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch, as streaming draws them from the streams, with an id for every repetition."""
        units, ids = super().resample_streams(epoch, stream_id)
        return units, ids + self.num_samples * repetitions(ids) if self.num_streams > 1 else ids

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Streaming's, but a failure that ended it early is raised here: its caller would wait for the dead thread."""
        yield from super()._each_sample_id(it)
        if self._failure is not None:
            raise self._failure

    def __getitem__(self, at: Any) -> dict[str, Any]:
        try:
            return self._sample(at)
        except _UNREADABLE as error:
            if self._failure is not None:
                raise self._failure from error
            shard_id = self.spanner[at][0]
            if self._stream(shard_id).origin is None:
                raise self._unreadable(at, error) from error
        self.evict_shard(shard_id)  # damaged in the cache: it is fetched again
        try:
            return self._sample(at)
        except _UNREADABLE as error:
            raise self._unreadable(at, error) from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Called by the reading thread, and by the reader that finds no file. Raises UserError when it cannot be had.

        Left to streaming, the thread dies with the shard marked as being prepared, and the reader waits for ever.
        """
        if not blocking and self._is_there(shard_id):
            return
        path = self._path(shard_id)
        try:
            if not path.is_file() and self._stream(shard_id).origin is None:
                raise UserError(f"{path} is missing; restore the shard or prepare again")
            super().prepare_shard(shard_id, blocking)
            self._found.add(shard_id)
        except (UserError, *_UNREADABLE) as error:
            if self._shard_states[shard_id] == ShardState.PREPARING:
                self._shard_states[shard_id] = ShardState.REMOTE
            self._failure = error if isinstance(error, UserError) else UserError(f"cannot prepare {path}: {error}")
            raise self._failure from error

    def _is_there(self, shard_id: int) -> bool:
        """Whether it has been prepared and not been evicted since; then it is the last to be evicted.

        The reading thread asks for every sample. Streaming would take a lock between processes and look at the disk
        each time, which costs more than reading the sample; a file that is gone is found out by its reader.
        """
        if shard_id not in self._found or self._shard_states[shard_id] != ShardState.LOCAL:
            return False
        if self.cache_limit is not None:
            self._shard_access_times[shard_id] = time.time_ns()
        return True

    def on_exception(self, future: Future) -> None:
        """Tell the other threads; the reader raises the failure, so that nothing is logged here."""
        if (error := future.exception()) is not None:
            self._failure = self._failure or UserError(f"{self._places()} cannot be read: {error!r}")
            self._event.set()

    def explain_early_end(self) -> NoReturn:
        """UserError that says why the samples ended before the epoch did."""
        for stream in self.streams:
            check_dataset(Path(stream.local))
        raise UserError(
            f"{self._places()} could not be read to its end; check it with `scmdm prepare --verify DIRECTORY`"
        )

    def _places(self) -> str:
        return ", ".join(str(Path(stream.local) / stream.split) for stream in self.streams)

    def _sample(self, at: Any) -> dict[str, Any]:
        found = super().__getitem__(at % self.num_samples)
        more = {name: np.asarray(found[name]).astype(np.int64) for name in MORE if name in found}
        return {"tokens": found[COLUMN].astype(np.int64), "index": at, **more}

    def _unreadable(self, at: Any, error: Exception) -> UserError:
        reason, sample = " ".join(str(error).split())[:200], at % self.num_samples
        path = self._path(self.spanner[at][0])
        return UserError(f"cannot read sample {sample} from {path}: {reason}; restore the shard or prepare again")

    def _stream(self, shard_id: int) -> TokenStream:
        return self.streams[self.stream_per_shard[shard_id]]

    def _path(self, shard_id: int) -> Path:
        shard: Any = self.shards[shard_id]
        return Path(shard.dirname) / shard.split / shard.raw_data.basename


def _faster(reader: Any) -> ShardReader:
    names = ("column_encodings", "column_names", "column_sizes", "compression", "hashes", "raw_data")
    more = ("samples", "size_limit", "zip_data")
    return ShardReader(reader.dirname, reader.split, **{name: getattr(reader, name) for name in (*names, *more)})


class _Spans:
    """From a sample to its shard and its place there, as streaming's Spanner, but also from the ids of repetitions."""

    def __init__(self, samples_per_shard: np.ndarray) -> None:
        self._ends: list[int] = samples_per_shard.cumsum().tolist()

    def __getitem__(self, at: int) -> tuple[int, int]:
        sample = int(at) % self._ends[-1]
        shard_id = bisect_right(self._ends, sample)
        return shard_id, sample - (self._ends[shard_id - 1] if shard_id else 0)


def repetitions(ids_N: np.ndarray) -> np.ndarray:
    """How many of the ids before each one equal it (N,)."""
    order = np.argsort(ids_N, kind="stable")
    new_N = np.diff(ids_N[order], prepend=-1) != 0
    starts_N = np.maximum.accumulate(np.where(new_N, np.arange(len(ids_N)), 0))
    found_N = np.empty_like(ids_N)
    found_N[order] = np.arange(len(ids_N)) - starts_N
    return found_N
