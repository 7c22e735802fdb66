"""Training data of a run: one data set, or several mixed by proportion."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from scmdm.config.data import DataConfig
from scmdm.data.dataset_files import check_dataset
from scmdm.data.manifest import Manifest, SplitInfo, remote_of
from scmdm.data.remote import open_cache
from scmdm.errors import UserError

# Properties that all streams must share, because they go through one model and one loss.
_SHARED = ("vocab_size", "mask_id", "length", "pad_policy", "bos_policy", "framing")


@dataclass(frozen=True)
class DataStream:
    """One data set of a mixture."""

    key: str  # configuration key, for error messages
    root: Path
    manifest: Manifest
    proportion: float | None = None  # share of the samples of an epoch; None: the only data set


@dataclass(frozen=True)
class DataMixture:
    """All data sets of a run, sorted by name; sample ids are numbered across them in this order."""

    streams: tuple[DataStream, ...]
    manifest: Manifest  # of the mixture; its fingerprint covers every stream and proportion
    validated: tuple[DataStream, ...]  # streams that validation reads

    @classmethod
    def at(cls, root: Path) -> DataMixture:
        """Open a single data set. Raises UserError when a file is missing or has another size."""
        stream = DataStream("data.path", root, check_dataset(root))
        return cls((stream,), stream.manifest, (stream,))

    @property
    def tokenizer_file(self) -> Path:
        return self.streams[0].root / self.manifest.tokenizer.file

    def require_splits(self, train: str, validation: str) -> None:
        """Raise UserError for the first data set without the split that training or validation reads."""
        for streams, split in ((self.streams, train), (self.validated, validation)):
            for stream in streams:
                stream.manifest.split(split, stream.root)

    def validation_shares(self, samples: int) -> list[tuple[DataStream, int]]:
        """Divide `samples` validation sequences among the streams, in proportion and at least one each."""
        total = sum(stream.proportion or 1.0 for stream in self.validated)
        return [(stream, max(1, round(samples * (stream.proportion or 1.0) / total))) for stream in self.validated]


def open_data(config: DataConfig, *, checked: bool = False) -> DataMixture:
    """Open the data sets of a run, and fetch manifests, tokenizers and indexes of remote ones.

    If they are `checked`, another process of this machine has just done so, and only the manifests are read. Raises
    UserError when a file is missing or has another size, and when the data sets cannot be mixed.
    """
    if not config.streams:
        assert config.path is not None
        streams = [_open("data.path", config.path, config.remote, None, checked)]
    else:
        total = sum(stream.proportion for stream in config.streams.values())
        streams = [
            _open(f"data.streams.{name}", stream.path, stream.remote, stream.proportion / total, checked)
            for name, stream in sorted(config.streams.items())
        ]
    for one, other in combinations(streams, 2):
        _require_mixable(one, other)
    if config.cache_limit is not None:
        _require_caches(config.cache_limit, streams)
    wanted = f"data.streams.{config.validation_stream}"
    validated = [stream for stream in streams if config.validation_stream is None or stream.key == wanted]
    manifest = streams[0].manifest if not config.streams else _mixed_manifest(streams)
    return DataMixture(tuple(streams), manifest, tuple(validated))


def _open(key: str, path: str, remote: str | None, proportion: float | None, checked: bool) -> DataStream:
    root = Path(path)
    if checked:
        return DataStream(key, root, Manifest.read(root), proportion)
    if remote is not None:
        open_cache(root, remote, key)
    return DataStream(key, root, check_dataset(root), proportion)


def _require_caches(limit: str, streams: list[DataStream]) -> None:
    """Raise UserError for a data set that is not a cache: a cache limit removes shards."""
    for stream in streams:
        if remote_of(stream.root) is None:
            raise UserError(
                f"data.cache_limit={limit} is not possible, because {stream.key}={stream.root} is not the cache of a "
                "remote data set, and a limit removes shards; leave it out, or give every data set a remote"
            )


def _require_mixable(one: DataStream, other: DataStream) -> None:
    if os.path.realpath(one.root) == os.path.realpath(other.root):
        raise UserError(f"{one.key} and {other.key} are the same directory {one.root}; give each its own, or drop one")
    if one.manifest.tokenizer.sha256 != other.manifest.tokenizer.sha256:
        raise UserError(
            f"{one.key} and {other.key} have different tokenizers ({one.root / one.manifest.tokenizer.file}, "
            f"{other.root / other.manifest.tokenizer.file}); prepare both with the same one"
        )
    for name in _SHARED:
        ours, theirs = getattr(one.manifest, name), getattr(other.manifest, name)
        if ours != theirs:
            raise UserError(
                f"{one.key} has {name}={ours!r}, {other.key} has {theirs!r}; prepare one of them again with the "
                f"other's {name}"
            )


def _mixed_manifest(streams: list[DataStream]) -> Manifest:
    """Make a manifest of the common properties, the summed sizes of the common splits, and the proportions."""
    first = streams[0].manifest
    common = [name for name in first.splits if all(name in stream.manifest.splits for stream in streams)]
    parts = {name: [stream.manifest.splits[name] for stream in streams] for name in common}
    mixed = {
        stream.key.rpartition(".")[2]: {
            "name": stream.manifest.name,
            "fingerprint": stream.manifest.fingerprint(),
            "proportion": stream.proportion,
        }
        for stream in streams
    }
    return dataclasses.replace(
        first,
        name="+".join(stream.manifest.name for stream in streams),
        splits={
            name: SplitInfo(sum(part.samples for part in own), sum(part.tokens for part in own), [])
            for name, own in parts.items()
        },
        source={"streams": mixed},
        counts={},
        labels=first.labels if all(stream.manifest.labels == first.labels for stream in streams) else [],
    )
