"""Samples of one or several sharded data sets, read with mosaicml-streaming.

Extends streaming in three ways: every repetition of a sample has an id of its own; `scmdm.data.remote` fetches and
verifies shards; and the reader raises errors that name the file, where streaming would end the epoch silently.

Legend: L length, N samples.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from scmdm.data.dataset_files import check_dataset
from scmdm.data.manifest import remote_of
from scmdm.data.mixture import DataStream
from scmdm.data.mosaic_streaming import TICK, Reader, ShardState, Stream, StreamingDataset
from scmdm.data.remote import remove_abandoned
from scmdm.data.shard_files import prepare_shard
from scmdm.data.shard_index import COLUMN, OPTIONAL_COLUMNS, find_wrong_value, read_index
from scmdm.data.shard_reader import ShardReader
from scmdm.errors import UserError
from scmdm.system.untrusted import describe


class TokenStream(Stream):
    """A split of one data set, whose missing shards are fetched and whose compressed shards are decompressed.

    Streaming is not given the remote: its own download would leave a damaged shard in the cache and use it at the
    next attempt, and it refuses a directory that a killed run has left in shared memory. Its own decompression
    allocates whatever the header of the compressed file says.
    """

    def __init__(self, stream: DataStream, split: str) -> None:
        super().__init__(local=os.path.realpath(stream.root), split=split, proportion=stream.proportion)
        self.root, self.manifest = stream.root, stream.manifest
        self.origin = remote_of(stream.root)
        self._files = {file.file: file for file in stream.manifest.split(split, stream.root).files}

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Reader]:
        """Return readers of the shards, after a check of the index. Raises UserError when it is damaged."""
        index = read_index(Path(self.local), self.split, self.manifest)
        return [ShardReader(Path(self.local), self.split, shard) for shard in index.shards]

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: np.ndarray) -> None:
        """Find out which shards are present, in one process of a machine."""
        remove_abandoned([Path(self.local) / self.split])
        super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        """Make a shard readable and return the number of bytes added to the directory."""
        assert isinstance(shard, ShardReader)
        file = self._files[f"{self.split}/{shard.info.stored.basename}"]
        return prepare_shard(Path(self.local), self.split, shard.info, self.origin, file)


class TokenDataset(StreamingDataset):
    """Dataset of samples `{"tokens": int64 (L,), "index": int}`.

    Packed samples also have `documents` int64 (L,), samples with prompts `given` int64 (), and samples with classes
    `label` int64 ().

    `index`, on which all noise is keyed, is the position of the sample in its split, numbered across all streams. When
    a stream is drawn more than once in an epoch, each repetition of a sample adds the number of all samples to the
    index, because equal indices in one batch would have equal masks.
    """

    streams: list[TokenStream]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spanner: Any = _Spans(self.samples_per_shard)
        self._failure: UserError | None = None  # raised in a reading thread
        self._prepared: set[int] = set()  # shards that this process has prepared
        self._labels = max(len(stream.manifest.labels) for stream in self.streams)

    @property
    def lock_files(self) -> tuple[Path, ...]:
        """Files of the locks between processes, in the temporary directory."""
        return Path(self._shared_barrier.filelock_path), Path(self._cache_filelock_path)

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample ids of an epoch, drawn by streaming, with distinct ids for repetitions."""
        units, ids = super().resample_streams(epoch, stream_id)
        return units, ids + self.num_samples * repetitions(ids) if self.num_streams > 1 else ids

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Yield ids as streaming does, but raise a failure of the reading thread instead of waiting forever."""
        yield from super()._each_sample_id(it)
        if self._failure is not None:
            raise self._failure

    def __getitem__(self, at: Any) -> dict[str, Any]:
        try:
            return self._sample(at)
        except UserError:
            raise
        except Exception as error:
            if self._failure is not None:
                raise self._failure from error
            shard_id = self.spanner[at][0]
            if not self._is_copy(shard_id):
                raise self._unreadable(at, describe(error)) from error
        try:
            self.evict_shard(shard_id)  # damaged: fetch or decompress it again
            return self._sample(at)
        except UserError:
            raise
        except Exception as error:
            raise self._unreadable(at, describe(error)) from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Make a shard available, for the reading thread or for a reader that misses a file.

        Raises UserError when the shard is missing or cannot be fetched. In streaming the thread would end and leave the
        shard marked as being prepared, so that the reader would wait forever.
        """
        if not blocking and self._is_prepared(shard_id):
            return
        path = self._path(shard_id)
        try:
            if not path.is_file() and not self._is_copy(shard_id):
                raise UserError(f"{path} is missing; restore the shard or prepare again")
            super().prepare_shard(shard_id, blocking)
            self._prepared.add(shard_id)
        except Exception as error:
            if self._shard_states[shard_id] == ShardState.PREPARING:
                self._shard_states[shard_id] = ShardState.REMOTE
            named = UserError(f"cannot prepare {path}: {describe(error)}")
            self._failure = error if isinstance(error, UserError) else named
            raise self._failure from error

    def _ready_thread(self, it: Any) -> None:
        """Advance `it.ready_index` over the samples whose shards are present, ahead of the reader.

        As streaming's, but a shard that another thread evicts while this one waits for it is fetched again. Streaming
        looks once whether the shard is missing, and then waits for ever.
        """
        while not (it.should_exit() or it.ready_index == it.total or self._event.is_set()):
            sample_id = it.sample_ids[it.ready_index]
            is_far = self.predownload is not None and self.predownload < it.ready_index - it.yield_index
            if is_far or not (sample_id == -1 or self._is_ready(self.spanner[sample_id][0])):
                time.sleep(TICK)
                continue
            it.ready_index += 1
        it.on_exit()

    def _is_ready(self, shard_id: int) -> bool:
        if self._shard_states[shard_id] == ShardState.REMOTE:
            self.prepare_shard(shard_id, False)
        return bool(self._shard_states[shard_id] == ShardState.LOCAL)

    def _is_prepared(self, shard_id: int) -> bool:
        """Return whether this process has prepared the shard and not evicted it since; mark it as recently used.

        The reading thread calls this for every sample. Streaming would acquire an inter-process lock and check the disk
        each time, which costs more than reading the sample. The reader notices a file that has been removed.
        """
        if shard_id not in self._prepared or self._shard_states[shard_id] != ShardState.LOCAL:
            return False
        if self.cache_limit is not None:
            self._shard_access_times[shard_id] = time.time_ns()
        return True

    def on_exception(self, future: Future) -> None:
        """Notify the other threads. The reader raises the failure, so it is not logged here."""
        if (error := future.exception()) is not None:
            self._failure = self._failure or UserError(f"{self._split_paths()} cannot be read: {describe(error)}")
            self._event.set()

    def explain_early_end(self) -> NoReturn:
        """Raise UserError because the samples ended before the epoch did."""
        for stream in self.streams:
            check_dataset(Path(stream.local))
        raise UserError(
            f"{self._split_paths()} ended before the epoch did; check it with `scmdm prepare --verify DIRECTORY`"
        )

    def _split_paths(self) -> str:
        return ", ".join(str(Path(stream.local) / stream.split) for stream in self.streams)

    def _sample(self, at: Any) -> dict[str, Any]:
        found = super().__getitem__(at % self.num_samples)
        more = {name: np.asarray(found[name]).astype(np.int64) for name in OPTIONAL_COLUMNS if name in found}
        return {"tokens": found[COLUMN].astype(np.int64), "index": at, **more}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch. Raises UserError, which names file and sample, for a value that no sample can have."""
        names = [COLUMN, *(n for n in OPTIONAL_COLUMNS if all(n in sample for sample in samples))]  # streams may differ
        columns = {name: np.stack([sample[name] for sample in samples]) for name in names}
        wrong = find_wrong_value(columns, self.streams[0].manifest, self._labels)
        if wrong is not None:
            raise self._unreadable(samples[wrong.row]["index"], wrong.reason)
        index = torch.tensor([int(sample["index"]) for sample in samples])
        return {**{name: torch.from_numpy(values) for name, values in columns.items()}, "index": index}

    def _unreadable(self, at: Any, reason: str) -> UserError:
        sample, shard_id = at % self.num_samples, self.spanner[at][0]
        root = self._stream(shard_id).root
        return UserError(
            f"cannot read sample {sample} from {self._path(shard_id)}: {reason}; check the data set with "
            f"`scmdm prepare --verify {root}`, and restore the shard or prepare again"
        )

    def _stream(self, shard_id: int) -> TokenStream:
        return self.streams[self.stream_per_shard[shard_id]]

    def _is_copy(self, shard_id: int) -> bool:
        """Return whether the file of a shard can be made again: from a remote data set, or from a compressed file."""
        shard: Any = self.shards[shard_id]
        return self._stream(shard_id).origin is not None or shard.compression is not None

    def _path(self, shard_id: int) -> Path:
        shard: Any = self.shards[shard_id]
        return Path(shard.dirname) / shard.split / shard.raw_data.basename


class _Spans:
    """Map from sample ids, including those of repetitions, to shard and row. Replaces streaming's Spanner."""

    def __init__(self, samples_per_shard: np.ndarray) -> None:
        self._ends: list[int] = samples_per_shard.cumsum().tolist()

    def __getitem__(self, at: int) -> tuple[int, int]:
        sample = int(at) % self._ends[-1]
        shard_id = bisect_right(self._ends, sample)
        return shard_id, sample - (self._ends[shard_id - 1] if shard_id else 0)


def repetitions(ids_N: np.ndarray) -> np.ndarray:
    """Return the number of earlier equal ids for each id, (N,)."""
    order = np.argsort(ids_N, kind="stable")
    new_N = np.diff(ids_N[order], prepend=-1) != 0
    starts_N = np.maximum.accumulate(np.where(new_N, np.arange(len(ids_N)), 0))
    found_N = np.empty_like(ids_N)
    found_N[order] = np.arange(len(ids_N)) - starts_N
    return found_N
