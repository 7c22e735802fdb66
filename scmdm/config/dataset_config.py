"""The keys of a run that say what it trains on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from scmdm.errors import UserError

_SIZE = re.compile(r"\d+(\.\d+)?(b|kb|mb|gb|tb)?")


@dataclass
class StreamConfig:
    """One of several data sets that are mixed."""

    path: str = MISSING
    proportion: float = MISSING  # of the samples of an epoch, relative to the sum over all streams
    remote: str | None = None  # where the data set is; path is then its local cache


@dataclass
class DataConfig:
    """One data set (`path`) or several (`streams`)."""

    path: str | None = None  # data set written by `scmdm prepare`
    remote: str | None = None  # s3://bucket/prefix of the data set; path is then its local cache
    streams: dict[str, StreamConfig] = field(default_factory=dict)  # or several: NAME: {path, remote, proportion}
    validation_stream: str | None = None  # the one to validate on; null: all, in their proportions
    cache_limit: str | None = None  # such as 10gb: training shards beyond it are removed from the caches; null: none
    shuffle_block: int | None = None  # samples shuffled among each other; null: 262144. A cache must hold 2 blocks
    train_split: str = "train"
    validation_split: str = "validation"
    num_canonical_nodes: int = 1  # fixes the sample order whatever the number of machines
    num_workers: int = 0  # loader processes per rank

    @property
    def label(self) -> str:
        """What the user has given, for messages."""
        return f"data.streams={','.join(sorted(self.streams))}" if self.streams else f"data.path={self.path}"

    def validate(self) -> None:
        """Raise UserError unless exactly one of path and streams is given, whole."""
        if self.path is None and not self.streams:
            raise UserError(
                "key `data.path` is not set; give it in the YAML file or as data.path=..., or several data sets as "
                "data.streams"
            )
        if self.path is not None and self.streams:
            raise UserError(f"data.path={self.path} and data.streams are both set; give one of them")
        if self.remote is not None and self.streams:
            raise UserError(f"data.remote={self.remote} belongs to data.path; give data.streams.NAME.remote instead")
        for name, stream in self.streams.items():
            if not (stream.proportion > 0 and math.isfinite(stream.proportion)):
                raise UserError(
                    f"data.streams.{name}.proportion={stream.proportion!r} is not possible; it must be above 0: "
                    "leave out a stream that is not wanted"
                )
        if self.cache_limit is not None and not _SIZE.fullmatch(self.cache_limit.strip().lower()):
            raise UserError(f"data.cache_limit={self.cache_limit!r} is not possible; it must be a size such as 10gb")
        if self.shuffle_block is not None and self.shuffle_block < 1:
            raise UserError(f"data.shuffle_block={self.shuffle_block} is not possible; it must be at least 1, or null")
        if self.validation_stream is not None and self.validation_stream not in self.streams:
            raise UserError(
                f"data.validation_stream={self.validation_stream!r} is not possible; it must be one of "
                f"{', '.join(self.streams) or 'data.streams, which is empty'}"
            )
