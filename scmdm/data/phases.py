"""What is done with a corpus, part by part: hash its files, scan it, fit the tokenizer, encode it.

Each function writes one result into a directory of its own, which depends on nothing but the corpus, the settings and
results of the phase before.

Legend: N records of a part.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scmdm.config.prepare import PrepareConfig
from scmdm.data.duplicates import repetitions
from scmdm.data.framing import FRAMERS, Framer, Row
from scmdm.data.records import Part, Record, Source, Tally
from scmdm.data.shards import Description, write_piece
from scmdm.data.tokenizers import (
    Tokenizer,
    UnknownSymbol,
    learns_from_text,
    load_tokenizer,
    make_tokenizer,
    open_tokenizer,
    symbols_of,
)
from scmdm.errors import UserError
from scmdm.files import sha256_file

SPLITS = ("train", "validation", "test")
_SAMPLE_BYTES = 1 << 28  # of text that sentencepiece is trained on, at most; it holds all of it in memory


def hash_files(source: Source, part: Part, to: Path) -> None:
    """SHA-256 of the whole files of a part."""
    files = source.files()
    hashes = {piece.file: sha256_file(files[piece.file]) for piece in part.slices}
    (to / "hashes.json").write_text(json.dumps(hashes))


def scan(config: PrepareConfig, source: Source, part: Part, on_read: Callable[[int], None], to: Path) -> None:
    """Clean records with their hashes, what was left out, and what fitting a tokenizer needs."""
    tally = Tally(refuse=config.on_dirty == "refuse", on_read=on_read)
    sampled = min(1.0, _SAMPLE_BYTES / max(1, sum(path.stat().st_size for path in source.files().values())))
    hashes: list[int] = []
    symbols: set[str] = set()
    with open(to / "records.jsonl", "w") as records, open(to / "sample.jsonl", "w") as sample:
        for record in _limited(source.records(part, tally), config.limit):
            try:
                symbols.update(symbols_of(config.tokenizer, record.text))
            except UnknownSymbol as error:
                tally.drop("unknown symbol", f"{source.name}: {error}")
                continue
            digest = _digest(record)
            row = len(hashes)
            hashes.append(int.from_bytes(digest[:8], "big"))
            records.write(_to_json(record) + "\n")
            if not _learns(config) or _split(config, part, hashes[-1]) != "train":
                continue
            if int.from_bytes(digest[8:16], "big") < sampled * 2**64:
                sample.write(json.dumps([row, record.text]) + "\n")
    hashes_N = np.array(hashes, np.uint64)
    order_N = np.argsort(hashes_N, kind="stable")
    for name, values in (("hashes", hashes_N), ("sorted", hashes_N[order_N]), ("order", order_N)):
        np.save(to / f"{name}.npy", values)
    (to / "scan.json").write_text(json.dumps({"counts": tally.counts, "symbols": sorted(symbols)}))


def _learns(config: PrepareConfig) -> bool:
    return config.tokenizer_path is None and learns_from_text(config.tokenizer)


def _limited(records: Iterator[Record], limit: int | None) -> Iterator[Record]:
    """Until so many different ones were seen."""
    if limit is None:
        yield from records
        return
    seen: set[bytes] = set()
    for record in records:
        yield record
        seen.add(_digest(record)[:8])
        if len(seen) == limit:
            return


def _digest(record: Record) -> bytes:
    if record.prompt is None:
        return hashlib.sha256(_content(record)).digest()
    return hashlib.sha256(json.dumps([record.prompt, record.content]).encode()).digest()


def _content(record: Record) -> bytes:
    return record.content if isinstance(record.content, bytes) else record.content.encode()


def _to_json(record: Record) -> str:
    if isinstance(record.content, bytes):
        return json.dumps([1, record.content.decode("latin-1"), record.label, None])
    return json.dumps([0, record.content, record.label, record.prompt])


def _from_json(line: str) -> Record:
    raw, content, label, prompt = json.loads(line)
    return Record(content.encode("latin-1") if raw else content, label, prompt)


def fit(config: PrepareConfig, parts: Sequence[Part], scans: Sequence[Path], to: Path) -> None:
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
    )
    tokenizer.save(to / "tokenizer")


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """The tokenizer of `tokenizer_path`; None when it is to be made. Raises UserError when it cannot be read."""
    if config.tokenizer_path is None:
        return None
    return open_tokenizer(config.tokenizer, Path(config.tokenizer_path), padded=config.framing != "concatenate")


@dataclass(frozen=True)
class Place:
    """Where a part's records are in the corpus."""

    first: int  # number of the part's first record
    held_out: int | None  # number of the first record of the corpus that is held out; None: hashes decide


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
    empty = (
        np.load(path, allow_pickle=False) if path.stat().st_size <= 128 else None
    )  # a header, which cannot be mapped
    return empty if empty is not None else np.load(path, mmap_mode=mode)


def _repeated(fitted: Path, number: int) -> Path:
    return fitted / f"repeated-{number:05}.npy"


def _sample(scans: Sequence[Path], repeated: Sequence[np.ndarray], places: Sequence[Place]) -> Iterator[str]:
    for scan, mask_N, place in zip(scans, repeated, places, strict=True):
        with open(scan / "sample.jsonl") as file:
            for line in file:
                row, text = json.loads(line)
                if not mask_N[row] and (place.held_out is None or place.first + row < place.held_out):
                    yield text


def fitted_tokenizer(fitted: Path) -> Tokenizer:
    """What `fit` has made."""
    return load_tokenizer(next((fitted / "tokenizer").iterdir()))


def encode(
    config: PrepareConfig, source: Source, part: Part, scanned: Path, fitted: Path, number: int, to: Path
) -> None:
    """Shards of one part's records, by split."""
    tally = Tally(refuse=config.on_dirty == "refuse")
    rows = _rows(config, source, part, scanned, fitted, number, tally)
    write_piece(to, rows, fitted_tokenizer(fitted), describe(config, source), config.shard_mb << 20)
    (to / "counts.json").write_text(json.dumps({"counts": tally.counts}))


def _rows(
    config: PrepareConfig, source: Source, part: Part, scanned: Path, fitted: Path, number: int, tally: Tally
) -> Iterator[tuple[str, Row]]:
    """The sequences of one part, each with its split; what is left out goes to the tally."""
    tokenizer, framers = fitted_tokenizer(fitted), dict[str, Framer]()
    for split, record in _records(config, part, scanned, fitted, number, tally):
        try:
            prompt = tokenizer.encode(record.prompt) if record.prompt else []
            ids = tokenizer.encode(record.content)
        except UnknownSymbol as error:
            tally.drop("unknown symbol", f"{source.name}: {error}")
            continue
        whole = source.whole_records or record.prompt is not None
        if whole and len(prompt) + len(ids) > config.length - 2:
            tally.drop("too long", f"{source.name}: {record.text[:80]!r} has {len(prompt) + len(ids)} tokens")
            continue
        tally.counts["kept"] += 1
        if record.prompt is not None:
            yield split, Row([tokenizer.bos_id, *prompt, *ids, tokenizer.eos_id], record.label, given=1 + len(prompt))
            continue
        framer = framers.setdefault(split, FRAMERS[config.framing](config.length, tokenizer))
        yield from ((split, row) for row in framer.add(ids, record.label))
    for split, framer in framers.items():
        yield from ((split, row) for row in framer.finish())
        if framer.dropped:
            tally.counts["tokens left over"] += framer.dropped


def _records(
    config: PrepareConfig, part: Part, scanned: Path, fitted: Path, number: int, tally: Tally
) -> Iterator[tuple[str, Record]]:
    """The records of a part that are no repetitions, each with its split."""
    hashes_N, repeated_N = np.load(scanned / "hashes.npy"), np.load(_repeated(fitted, number))
    place = Place(**json.loads((fitted / "places.json").read_text())[number])
    with open(scanned / "records.jsonl") as file:
        lines = zip(file, hashes_N.tolist(), repeated_N.tolist(), strict=True)
        for at, (line, hash_, repeated) in enumerate(lines, place.first):
            if repeated:
                tally.counts["dropped: duplicate"] += 1  # not dirt
            elif place.held_out is not None:
                yield "validation" if at >= place.held_out else "train", _from_json(line)
            else:
                yield _split(config, part, hash_), _from_json(line)


def describe(
    config: PrepareConfig, source: Source, described: dict[str, Any] | None = None, counts: dict[str, int] | None = None
) -> Description:
    """What the manifest is to say."""
    return Description(
        source.name,
        config.length,
        config.pad_policy,
        config.bos_policy,
        described or {},
        counts or {},
        source.labels,
        "prompts" if config.response_key else config.framing,
    )


def total_counts(files: Sequence[Path]) -> dict[str, int]:
    """Counts of all parts together, sorted by name."""
    total = Counter[str]()
    for file in files:
        total.update(json.loads(file.read_text())["counts"])
    return dict(sorted(total.items()))


def splits(config: PrepareConfig) -> tuple[str, ...]:
    """The splits that the data set is to have."""
    return SPLITS if config.held_out_last is None else ("train", "validation")


def _split(config: PrepareConfig, part: Part, hash_: int) -> str:
    if config.held_out_last is not None:
        return "train"  # until all parts have been counted
    return part.split or split_of_hash(hash_, config.validation_fraction, config.test_fraction)


def split_of(content: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a record: a hash of its text, so that it never changes when records are added or reordered."""
    return split_of_hash(int.from_bytes(_digest(Record(content))[:8], "big"), validation_fraction, test_fraction)


def split_of_hash(hash_: int, validation_fraction: float, test_fraction: float) -> str:
    """The split of a record by the first 8 bytes of its SHA-256."""
    u = hash_ / 2**64
    if u < test_fraction:
        return "test"
    return "validation" if u < test_fraction + validation_fraction else "train"
