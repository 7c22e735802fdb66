"""Steps that need all parts of a corpus: duplicates, positions of the parts, the tokenizer.

Legend: N records of a part.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from scmdm.config.preparation import TOKENIZERS, PrepareConfig
from scmdm.data.preparation.duplicates import duplicates
from scmdm.data.preparation.records import PLACES
from scmdm.data.preparation.source import Source
from scmdm.data.preparation.splits import by_position, is_held_out
from scmdm.data.preparation.task_queue import read_result
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.errors import UserError
from scmdm.system.untrusted import reading

_LARGEST_PERMUTATION = 1 << 27  # records


@dataclass(frozen=True)
class PartSummary:
    """What a task has counted, and the symbols that it has found, of the records of a part."""

    counts: dict[str, int]
    places: dict[str, list[str]] = field(default_factory=dict)  # the first few of each reason
    symbols: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PartPosition:
    """Position of a part's records in the corpus."""

    first: int  # index of the first record of the part
    total: int  # records of the corpus, duplicates included


def fit(config: PrepareConfig, source: Source, scans: Sequence[Path], to: Path) -> None:
    """Mark duplicates in `repeated-PART.npy`, and make the tokenizer.

    A vocabulary of symbols covers all splits, because unknown symbols cannot be encoded; other tokenizers are trained
    on the training split. Raises UserError when the corpus has no usable record.
    """
    repeated = _mark_duplicates(config, scans, to)
    if not any(not mask_N.all() for mask_N in repeated):
        raise UserError(no_usable_record([scan / "scan.json" for scan in scans]))
    positions = _positions(config, [len(mask_N) for mask_N in repeated])
    (to / "positions.json").write_text(json.dumps([asdict(place) for place in positions]))
    (to / "tokenizer").mkdir()
    tokenizer = given_tokenizer(config) or TOKENIZERS.load(config.tokenizer.name).build(
        config.tokenizer,
        symbols={symbol for scan in scans for symbol in read_result(scan / "scan.json", PartSummary).symbols},
        sample=_sample(config, scans, repeated, positions),
        layout=source.layout,
    )
    tokenizer.save(to / "tokenizer")


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """Open the tokenizer that the configuration names; None when one is to be built. Raises UserError."""
    tokenizer: type[Tokenizer] = TOKENIZERS.load(config.tokenizer.name)
    opened = tokenizer.open(config.tokenizer, padded=config.framing != "concatenate" and config.pad_policy != "eos")
    if config.source.framing == "chats":
        try:
            _ = opened.chat if opened is not None else None
        except UserError as error:
            raise UserError(f"source.chat_template=tokenizer: {error}; or set source.chat_template=none") from error
        if opened is None:
            raise UserError(
                f"source.chat_template=tokenizer is not possible with tokenizer.name={config.tokenizer.name}, which "
                "has no chat template; it must be none"
            )
    return opened


def fitted_tokenizer(fitted: Path) -> Tokenizer:
    """Return the tokenizer that `fit` has written, cached for all parts that a process encodes."""
    path = next((fitted / "tokenizer").iterdir())
    return _read_tokenizer(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_tokenizer(path: Path, _modified_ns: int) -> Tokenizer:  # the time distinguishes preparations in one directory
    return load_tokenizer(path)


def fitted_part(fitted: Path, number: int) -> tuple[np.ndarray, PartPosition]:
    """Return the mask of a part's duplicates, bool (N,), and its position in the corpus."""
    path = _duplicates_file(fitted, number)
    with reading(path, "list of duplicates", f"remove {fitted.parent} and start again"):
        return np.load(path), read_result(fitted / "positions.json", list[PartPosition])[number]


def total_counts(files: Sequence[Path]) -> dict[str, int]:
    """Sum the counts of all parts, sorted by name."""
    total = Counter[str]()
    for file in files:
        total.update(read_result(file, PartSummary).counts)
    return dict(sorted(total.items()))


def no_usable_record(files: Sequence[Path]) -> str:
    """Return a message that says why the records were dropped, and where the first of each kind is."""
    shown = "".join(f"; {reason}, as in {found[0]}" for reason, found in first_places(files).items())
    counts = total_counts(files)
    return f"the corpus holds no usable record ({counts}){shown}; check source.path, the tokenizer and length"


def first_places(files: Sequence[Path]) -> dict[str, list[str]]:
    """Return the first few places of each reason, of all parts."""
    found: dict[str, list[str]] = {}
    for file in files:
        for reason, places in read_result(file, PartSummary).places.items():
            found[reason] = (found.get(reason, []) + places)[:PLACES]
    return dict(sorted(found.items()))


def _positions(config: PrepareConfig, counts: Sequence[int]) -> list[PartPosition]:
    """Return the position of each part. Raises UserError when all records would be held out."""
    total, last = sum(counts), config.held_out_last
    if last is not None and last >= total:
        raise UserError(f"held_out_last={last}, but the corpus has {total} records; hold out fewer")
    if config.split_seed is not None and total > _LARGEST_PERMUTATION:
        raise UserError(
            f"split_seed={config.split_seed} is not possible with {total} records, but with {_LARGEST_PERMUTATION} at "
            "most, whose permutation is held in memory; use the fractions, or held_out_last"
        )
    return [PartPosition(first, total) for first, _ in zip(accumulate(counts, initial=0), counts, strict=False)]


def _mark_duplicates(config: PrepareConfig, scans: Sequence[Path], to: Path) -> list[np.ndarray]:
    hashes, order = ([_load_mapped(scan / f"{name}.npy") for scan in scans] for name in ("sorted", "order"))
    for number, hashes_N in enumerate(hashes):
        np.save(_duplicates_file(to, number), np.zeros(len(hashes_N), bool))
    masks = [_load_mapped(_duplicates_file(to, number), "r+") for number in range(len(scans))]
    if config.deduplicate:
        for number, rows in duplicates(hashes, order):
            masks[number][rows] = True
    return masks


def _load_mapped(path: Path, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    if path.stat().st_size <= 128:  # an array without elements cannot be mapped
        return np.load(path)
    return np.load(path, mmap_mode=mode)


def _duplicates_file(fitted: Path, number: int) -> Path:
    return fitted / f"repeated-{number:05}.npy"


def _sample(
    config: PrepareConfig, scans: Sequence[Path], repeated: Sequence[np.ndarray], positions: Sequence[PartPosition]
) -> Iterator[str]:
    for scan, mask_N, place in zip(scans, repeated, positions, strict=True):
        with open(scan / "sample.jsonl") as file:
            for line in file:
                row, text = json.loads(line)
                held_out = by_position(config) and is_held_out(config, place.first + row, place.total)
                if not mask_N[row] and not held_out:
                    yield text
