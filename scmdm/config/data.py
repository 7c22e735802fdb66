"""Configuration of the data that a run trains on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import MISSING

from scmdm.config.fields import PathKind, key, require
from scmdm.errors import UserError

_SIZE = re.compile(r"\d+(\.\d+)?(b|kb|mb|gb|tb)?")


@dataclass
class StreamConfig:
    """One of several data sets that are mixed."""

    path: str = key(MISSING, path=PathKind.INPUT, help="data set written by `scmdm prepare`", on_resume=True)
    proportion: float = key(
        MISSING, help="share of an epoch's samples, relative to the sum over all streams", above=0, at_most=1e9
    )
    remote: str | None = key(None, help="where the data set is stored; path is then its local cache", on_resume=True)


@dataclass
class DataConfig:
    """One data set (`path`) or several (`streams`).

    Paths may change when a run is resumed: the data set's fingerprint is checked instead.
    """

    path: str | None = key(None, path=PathKind.INPUT, help="data set written by `scmdm prepare`", on_resume=True)
    remote: str | None = key(
        None, help="s3://bucket/prefix of the data set; path is then its local cache", on_resume=True
    )
    streams: dict[str, StreamConfig] = key(
        factory=dict, help="several data sets to mix, NAME: {path, remote, proportion}"
    )
    validation_stream: str | None = key(None, help="stream to validate on; null: all, in their proportions")
    cache_limit: str | None = key(
        None,
        help="largest size of the local caches, such as 10gb: older training shards are removed; null: no limit",
        on_resume=True,
    )
    shuffle_block: int | None = key(
        None,
        help="samples shuffled together; null: 262144; a limited cache must hold 2 blocks",
        at_least=1,
        at_most=2**40,
    )
    train_split: str = key("train", help="split to train on")
    validation_split: str = key("validation", help="split to validate on")
    num_canonical_nodes: int | None = key(
        None,
        help="parts of the data that machines read separately, which fix the sample order; must divide the number of "
        "machines or be a multiple of it; null: 1, or for remote data a multiple of the machines at the first start, "
        "up to 64",
        at_least=1,
        at_most=65536,
    )
    num_workers: int = key(0, help="loader processes per rank", at_least=0, at_most=1024, on_resume=True)

    @property
    def label(self) -> str:
        """Key and value that name the data, for messages."""
        return f"data.streams={','.join(sorted(self.streams))}" if self.streams else f"data.path={self.path}"

    def validate(self) -> None:
        """Raise UserError unless exactly one of `path` and `streams` is given."""
        if self.path is None and not self.streams:
            raise UserError(
                "key `data.path` is not set; give it in the YAML file or as data.path=..., or several data sets as "
                "data.streams"
            )
        if self.path is not None and self.streams:
            raise UserError(f"data.path={self.path} and data.streams are both set; give one of them")
        if self.remote is not None and self.streams:
            raise UserError(f"data.remote={self.remote} belongs to data.path; give data.streams.NAME.remote instead")
        sized = self.cache_limit is None or _SIZE.fullmatch(self.cache_limit.strip().lower()) is not None
        require(sized, "data.cache_limit", self.cache_limit, "a size such as 10gb")
        wanted = f"one of {', '.join(self.streams)}" if self.streams else "null, because data.streams is empty"
        known = self.validation_stream is None or self.validation_stream in self.streams
        require(known, "data.validation_stream", self.validation_stream, wanted)
