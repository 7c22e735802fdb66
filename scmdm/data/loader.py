"""Reading shards back: a streaming loader that resumes in mid-epoch, and whole splits into memory.

Legend: B batch, L length, N samples.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.format.mds.reader import MDSReader
from torch import Tensor

from scmdm.data.manifest import Manifest, check_dataset
from scmdm.errors import UserError

COLUMN = "tokens"
_SHUFFLE_BLOCK = 1 << 18  # samples; fixed, because its default depends on the number of nodes


class TokenDataset(StreamingDataset):
    """Samples `{"tokens": int64 (L,), "index": int}`; the index is the sample's place in the split."""

    def __getitem__(self, at: Any) -> dict[str, Any]:
        try:
            return {"tokens": super().__getitem__(at)[COLUMN].astype(np.int64), "index": at}
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            path = self._path(self.spanner[at][0])
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot read sample {at} from {path}: {reason}; restore the shard or prepare again"
            ) from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Called by the reading thread, and by the reader that finds no file. Raises UserError when the shard is gone.

        Left to streaming, the thread dies with the shard marked as being prepared, and the reader waits for ever.
        """
        if not self._path(shard_id).is_file():
            raise UserError(f"{self._path(shard_id)} is missing; restore the shard or prepare again")
        super().prepare_shard(shard_id, blocking)

    def _path(self, shard_id: int) -> Path:
        shard: Any = self.shards[shard_id]
        return Path(shard.dirname) / shard.split / shard.raw_data.basename


def build_loader(
    root: Path,
    split: str,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    num_canonical_nodes: int = 1,
    num_workers: int = 0,
) -> StreamingDataLoader:
    """Batches `{"tokens": (B, L) int64, "index": (B,) int64}` of this rank, `batch_size` sequences each.

    Its `state_dict` and `load_state_dict` (before the first batch) resume in mid-epoch. The order depends on `seed`,
    the epoch and `num_canonical_nodes`, not on the number of ranks. Raises UserError when the data set is not whole or
    too small.
    """
    info = check_dataset(root).split(split, root)
    if drop_last and info.samples < batch_size:
        raise UserError(
            f"{root / split} has {info.samples} samples, fewer than a batch of {batch_size}; lower the batch size"
        )
    with warnings.catch_warnings(), _construction_lock():
        # streaming warns that a local directory has no remote, which is what is meant.
        warnings.simplefilter("ignore")
        dataset = TokenDataset(
            local=str(root.resolve()),
            split=split,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed % 2**32,
            shuffle_algo="py1e",
            shuffle_block_size=_SHUFFLE_BLOCK,
            num_canonical_nodes=num_canonical_nodes,
            predownload=8 * batch_size,
        )
    return StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, drop_last=drop_last, collate_fn=_collate
    )


@contextlib.contextmanager
def _construction_lock() -> Iterator[None]:
    """Two runs that start in the same moment would pick the same names in shared memory.

    The ranks of one run construct together and wait for each other inside, so they must not queue up here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    with FileLock(Path(tempfile.gettempdir()) / f"scmdm-streaming-{os.getuid()}.lock"):
        yield


def epochs(loader: StreamingDataLoader, root: Path, split: str, global_batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches for ever, epoch after epoch, each checked to be a whole one (but for the last short batch).

    A shard that disappears kills streaming's reading thread and ends its iterator early, without an error: UserError.
    """
    samples = Manifest.read(root).split(split, root).samples
    while True:
        yield from loader
        state = loader.state_dict()
        if state is None or samples - state["sample_in_epoch"] >= global_batch_size:
            check_dataset(root)
            raise UserError(
                f"{root / split} could not be read to its end; check it with `scmdm prepare --verify {root}`"
            )


def _collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    tokens = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]))
    return {"tokens": tokens, "index": torch.tensor([int(sample["index"]) for sample in samples])}


def read_split(root: Path, split: str, rows: Sequence[int] | None = None) -> np.ndarray:
    """Ids (N, L) of a split in their stored dtype: all, or those of `rows` (ascending).

    Raises UserError when a file is missing or damaged.
    """
    manifest = Manifest.read(root)
    wanted = range(manifest.split(split, root).samples) if rows is None else rows
    found: list[np.ndarray] = []
    try:
        first = 0
        for entry in json.loads((root / split / "index.json").read_text())["shards"]:
            reader = MDSReader.from_json(str(root), split, entry)
            end = first + reader.samples
            found += [reader[row - first][COLUMN] for row in wanted[len(found) : bisect_left(wanted, end)]]
            first = end
    except (OSError, ValueError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read {root / split}: {reason}; check it with `scmdm prepare --verify {root}`"
        ) from error
    return np.stack(found) if found else np.zeros((0, manifest.length), manifest.dtype)


def spread_rows(samples: int, wanted: int) -> list[int]:
    """`wanted` rows (all, if there are not so many) evenly over a split, whose order often means something."""
    return np.unique(np.linspace(0, samples - 1, min(wanted, samples)).round().astype(int)).tolist()
