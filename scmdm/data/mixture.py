"""What a run trains on: one data set, or several mixed by proportion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from scmdm.config.data import DataConfig
from scmdm.data.manifest import Manifest, SplitInfo, check_dataset, remote_of
from scmdm.data.remote import open_cache
from scmdm.errors import UserError

# What all streams must have in common: they go through one model, one loss.
_SHARED = ("vocab_size", "mask_id", "length", "pad_policy", "bos_policy", "framing")


@dataclass(frozen=True)
class Source:
    """One data set of a mixture."""

    key: str  # in the configuration, for messages
    root: Path
    manifest: Manifest
    proportion: float | None = None  # of the samples of an epoch; None: it is the only one


@dataclass(frozen=True)
class Data:
    """All data sets of a run, sorted by name: sample ids count through them in this order."""

    sources: tuple[Source, ...]
    manifest: Manifest  # of the whole: its fingerprint covers every source and proportion
    validated: tuple[Source, ...]  # those that validation reads

    @classmethod
    def at(cls, root: Path) -> Data:
        """A single data set; UserError when it is not whole at a glance."""
        source = Source("data.path", root, check_dataset(root))
        return cls((source,), source.manifest, (source,))

    @property
    def tokenizer_file(self) -> Path:
        return self.sources[0].root / self.manifest.tokenizer.file

    def require_splits(self, train: str, validation: str) -> None:
        """UserError names the first data set that lacks the split that it is asked for."""
        for sources, split in ((self.sources, train), (self.validated, validation)):
            for source in sources:
                source.manifest.split(split, source.root)

    def validation_shares(self, samples: int) -> list[tuple[Source, int]]:
        """How many of `samples` sequences each validated source gives: its proportion, at least one."""
        total = sum(source.proportion or 1.0 for source in self.validated)
        return [(source, max(1, round(samples * (source.proportion or 1.0) / total))) for source in self.validated]


def open_data(config: DataConfig) -> Data:
    """The data sets of a run, each whole at a glance; UserError when one is not, or when they cannot be mixed.

    A remote one is opened first: its manifest, tokenizer and indexes come into its cache.
    """
    if not config.streams:
        assert config.path is not None
        sources = [_open("data.path", config.path, config.remote, None)]
    else:
        total = sum(stream.proportion for stream in config.streams.values())
        sources = [
            _open(f"data.streams.{name}", stream.path, stream.remote, stream.proportion / total)
            for name, stream in sorted(config.streams.items())
        ]
    for one, other in combinations(sources, 2):
        _require_mixable(one, other)
    if config.cache_limit is not None:
        _require_caches(config.cache_limit, sources)
    wanted = f"data.streams.{config.validation_stream}"
    validated = [source for source in sources if config.validation_stream is None or source.key == wanted]
    manifest = sources[0].manifest if not config.streams else _mixed_manifest(sources)
    return Data(tuple(sources), manifest, tuple(validated))


def _open(key: str, path: str, remote: str | None, proportion: float | None) -> Source:
    root = Path(path)
    if remote is not None:
        open_cache(root, remote, key)
    return Source(key, root, check_dataset(root), proportion)


def _require_caches(limit: str, sources: list[Source]) -> None:
    """A limited cache is kept small by removing files: never those of a data set that is nowhere else."""
    for source in sources:
        if remote_of(source.root) is None:
            raise UserError(
                f"data.cache_limit={limit}, but {source.key}={source.root} is no cache of a remote data set: its "
                "shards may not be removed; leave data.cache_limit out, or give every data set a remote"
            )


def _require_mixable(one: Source, other: Source) -> None:
    if one.root.resolve() == other.root.resolve():
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


def _mixed_manifest(sources: list[Source]) -> Manifest:
    """The common properties, the sums of the common splits, and what is mixed in which proportions."""
    first = sources[0].manifest
    names = [name for name in first.splits if all(name in source.manifest.splits for source in sources)]
    mixed = {
        source.key.rpartition(".")[2]: {
            "name": source.manifest.name,
            "fingerprint": source.manifest.fingerprint(),
            "proportion": source.proportion,
        }
        for source in sources
    }
    return dataclasses.replace(
        first,
        name="+".join(source.manifest.name for source in sources),
        splits={name: _sum([source.manifest.splits[name] for source in sources]) for name in names},
        source={"streams": mixed},
        counts={},
        labels=first.labels if all(source.manifest.labels == first.labels for source in sources) else [],
    )


def _sum(splits: list[SplitInfo]) -> SplitInfo:
    return SplitInfo(sum(split.samples for split in splits), sum(split.tokens for split in splits), [])
