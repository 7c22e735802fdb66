"""What needs all parts of a corpus together: repetitions, places, the tokenizer.

Legend: N records of a part.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.duplicates import repetitions
from scmdm.data.preparation.records import Source, WithLayout
from scmdm.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, open_tokenizer
from scmdm.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a part's records are in the corpus."""

    first: int  # number of the part's first record
    held_out: int | None  # number of the first record of the corpus that is held out; None: hashes decide


def fit(config: PrepareConfig, source: Source, scans: Sequence[Path], to: Path) -> None:
    """Mark repetitions in `repeated-PART.npy`, and make the tokenizer.

    Symbols come from all splits (an unknown one could not be encoded), sentencepiece from the training split.
    """
    repeated = _mark_repetitions(config, scans, to)
    if not any(not mask_N.all() for mask_N in repeated):
        counts = total_counts([scan / "scan.json" for scan in scans])
        raise UserError(f"the corpus holds no usable record ({counts}); give one with text in it")
    places = _places(config, [len(mask_N) for mask_N in repeated])
    (to / "places.json").write_text(json.dumps([asdict(place) for place in places]))
    (to / "tokenizer").mkdir()
    tokenizer = given_tokenizer(config) or make_tokenizer(
        config.tokenizer,
        symbols={symbol for scan in scans for symbol in json.loads((scan / "scan.json").read_text())["symbols"]},
        sample=_sample(scans, repeated, places),
        vocab_size=config.vocab_size,
        layout=source.layout if isinstance(source, WithLayout) else None,
    )
    tokenizer.save(to / "tokenizer")


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """The tokenizer of `tokenizer_path`; None when it is to be made. Raises UserError when it cannot be read."""
    if config.tokenizer_path is None:
        return None
    return open_tokenizer(config.tokenizer, Path(config.tokenizer_path), padded=config.framing != "concatenate")


def fitted_tokenizer(fitted: Path) -> Tokenizer:
    """What `fit` has made; it is read once for all parts that a process encodes."""
    path = next((fitted / "tokenizer").iterdir())
    return _read_tokenizer(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_tokenizer(path: Path, _written_at: int) -> Tokenizer:
    """Another preparation in the same place has written another file."""
    return load_tokenizer(path)


def fitted_part(fitted: Path, number: int) -> tuple[np.ndarray, Place]:
    """Which records of a part are repetitions, bool (N,), and where the part is in the corpus."""
    return np.load(_repeated(fitted, number)), Place(**json.loads((fitted / "places.json").read_text())[number])


def total_counts(files: Sequence[Path]) -> dict[str, int]:
    """Counts of all parts together, sorted by name."""
    total = Counter[str]()
    for file in files:
        total.update(json.loads(file.read_text())["counts"])
    return dict(sorted(total.items()))


def _places(config: PrepareConfig, counts: Sequence[int]) -> list[Place]:
    """Raises UserError when nothing but what is held out is there."""
    total, last = sum(counts), config.held_out_last
    if last is not None and last >= total:
        raise UserError(f"held_out_last={last}, but the corpus has {total} records; hold out fewer")
    starts = accumulate(counts, initial=0)
    return [Place(first, total - last if last is not None else None) for first, _ in zip(starts, counts, strict=False)]


def _mark_repetitions(config: PrepareConfig, scans: Sequence[Path], to: Path) -> list[np.ndarray]:
    hashes, order = ([_mapped(scan / f"{name}.npy") for scan in scans] for name in ("sorted", "order"))
    for number, hashes_N in enumerate(hashes):
        np.save(_repeated(to, number), np.zeros(len(hashes_N), bool))
    masks = [_mapped(_repeated(to, number), "r+") for number in range(len(scans))]
    if config.deduplicate:
        for number, rows in repetitions(hashes, order):
            masks[number][rows] = True
    return masks


def _mapped(path: Path, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    if path.stat().st_size <= 128:  # nothing behind the header: that cannot be mapped
        return np.load(path)
    return np.load(path, mmap_mode=mode)


def _repeated(fitted: Path, number: int) -> Path:
    return fitted / f"repeated-{number:05}.npy"


def _sample(scans: Sequence[Path], repeated: Sequence[np.ndarray], places: Sequence[Place]) -> Iterator[str]:
    for scan, mask_N, place in zip(scans, repeated, places, strict=True):
        with open(scan / "sample.jsonl") as file:
            for line in file:
                row, text = json.loads(line)
                if not mask_N[row] and (place.held_out is None or place.first + row < place.held_out):
                    yield text
