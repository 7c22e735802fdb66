"""Assignment of records to splits.

Legend: N records of a corpus.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np

from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.records import SPLITS, Part, Record
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError


def splits_of(config: PrepareConfig, source: Source) -> tuple[str, ...]:
    """Return the names of the splits of the data set: `SPLITS`, and further ones that the source publishes."""
    if by_position(config):
        return "train", "validation"
    return (*SPLITS, *(name for name in source.published if name not in SPLITS))


def require_effective_fractions(config: PrepareConfig, source: Source) -> None:
    """Raise UserError for a fraction other than 0 and its default that takes no record out of the training split."""
    for split in ("validation", "test"):
        name = f"{split}_fraction"
        fraction, reason = getattr(config, name), ""
        if config.held_out_last is not None:
            reason = f"held_out_last={config.held_out_last}"
        elif config.split_seed is not None and split == "test":
            reason = f"split_seed={config.split_seed}, which makes no test split"
        elif not by_position(config) and split in source.published:
            reason = f"source.name={config.source.name}, since {source.name} has a {split} split of its own"
        if reason and fraction not in (0, getattr(PrepareConfig, name)):
            raise UserError(f"{name}={fraction} has no effect with {reason}; leave it out")


def by_position(config: PrepareConfig) -> bool:
    """Return whether the position of a record in the corpus decides its split, which is known after all were read."""
    return config.held_out_last is not None or config.split_seed is not None


def is_held_out(config: PrepareConfig, at: int, total: int) -> bool:
    """Return whether the record at a position is in the validation split, where positions decide."""
    if config.held_out_last is not None:
        return at >= total - config.held_out_last
    assert config.split_seed is not None
    return bool(_permuted(total, config.validation_fraction, config.split_seed)[at])


@lru_cache(maxsize=1)
def _permuted(total: int, fraction: float, seed: int) -> np.ndarray:
    """Return which records are held out, bool (N,), as `datasets.Dataset.train_test_split` chooses them."""
    held_out_N = np.zeros(total, bool)
    held_out_N[np.random.default_rng(seed).permutation(total)[: math.ceil(fraction * total)]] = True
    return held_out_N


def split_of(config: PrepareConfig, source: Source, part: Part, record: Record, hash_: int) -> str:
    """Return the split of a record.

    Published splits are kept. Validation and test, where they are not published, are taken out of the training set by
    the hash of the record's group or, without a group, by `hash_`, the hash of its content.
    """
    if part.split is not None and part.split != "train":
        return part.split
    if record.group is not None:
        hash_ = leading_bits(hashlib.sha256(record.group.encode()).digest())
    validation, test = (
        0.0 if name in source.published else fraction
        for name, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction))
    )
    return split_of_hash(hash_, validation, test)


def split_of_hash(hash_: int, validation_fraction: float, test_fraction: float) -> str:
    """Return the split of a record by its hash alone, independent of other records and of their order."""
    u = hash_ / 2**64
    if u < test_fraction:
        return "test"
    return "validation" if u < test_fraction + validation_fraction else "train"


def leading_bits(digest: bytes) -> int:
    """Return the first 8 bytes of a digest as an integer."""
    return int.from_bytes(digest[:8], "big")
