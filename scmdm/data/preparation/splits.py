"""Assignment of records to splits."""

from __future__ import annotations

import hashlib

from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.records import SPLITS, Part, Record
from scmdm.data.preparation.source import Source


def splits_of(config: PrepareConfig, source: Source) -> tuple[str, ...]:
    """Return the names of the splits of the data set: `SPLITS`, and further ones that the source publishes."""
    if config.held_out_last is not None:
        return "train", "validation"
    return (*SPLITS, *(name for name in source.published if name not in SPLITS))


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
