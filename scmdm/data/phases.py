"""What is done with a corpus, part by part: hash its files, scan it, fit the tokenizer, encode it.

Each function writes one result into a directory of its own, which depends on nothing but the corpus, the settings and
results of the phase before.

Legend: N records of a part.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scmdm.config.prepare import PrepareConfig
from scmdm.data.duplicates import repetitions
from scmdm.data.records import SPLITS, Part, Record, Source, Tally, WithLayout
from scmdm.data.shards import Description, Row, write_piece
from scmdm.data.tokenizers import (
    OwnFraming,
    Tokenizer,
    UnknownSymbol,
    learns_from_text,
    load_tokenizer,
    make_tokenizer,
    symbols_of,
)
from scmdm.errors import UserError
from scmdm.files import sha256_file

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
                symbols.update(symbols_of(config.tokenizer, record.content))
            except UnknownSymbol as error:
                tally.drop("unknown symbol", f"{source.name}: {error}")
                continue
            digest = _digest(record)
            row = len(hashes)
            hashes.append(int.from_bytes(digest[:8], "big"))
            records.write(_to_json(record) + "\n")
            if not learns_from_text(config.tokenizer) or _split(config, source, part, record, digest) != "train":
                continue
            if int.from_bytes(digest[8:16], "big") < sampled * 2**64:
                sample.write(json.dumps([row, record.content]) + "\n")
    hashes_N = np.array(hashes, np.uint64)
    order_N = np.argsort(hashes_N, kind="stable")
    for name, values in (("hashes", hashes_N), ("sorted", hashes_N[order_N]), ("order", order_N)):
        np.save(to / f"{name}.npy", values)
    (to / "scan.json").write_text(json.dumps({"counts": tally.counts, "symbols": sorted(symbols)}))


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
    return hashlib.sha256(_content(record)).digest()


def _content(record: Record) -> bytes:
    return record.content if isinstance(record.content, bytes) else record.content.encode()


def _to_json(record: Record) -> str:
    if isinstance(record.content, bytes):
        return json.dumps([1, base64.b64encode(record.content).decode(), record.label, record.group])
    return json.dumps([0, record.content, record.label, record.group])


def _from_json(line: str) -> Record:
    raw, content, label, group = json.loads(line)
    return Record(base64.b64decode(content) if raw else content, label, group)


def fit(config: PrepareConfig, source: Source, scans: Sequence[Path], to: Path) -> None:
    """Mark repetitions in `repeated-PART.npy`, and make the tokenizer.

    Symbols come from all splits (an unknown one could not be encoded), sentencepiece from the training split.
    """
    repeated = _mark_repetitions(config, scans, to)
    if not any(not mask_N.all() for mask_N in repeated):
        counts = total_counts([scan / "scan.json" for scan in scans])
        raise UserError(f"the corpus holds no usable record ({counts}); give one with text in it")
    symbols = {symbol for scan in scans for symbol in json.loads((scan / "scan.json").read_text())["symbols"]}
    tokenizer = make_tokenizer(
        config.tokenizer,
        symbols=symbols,
        sample=_sample(scans, repeated),
        vocab_size=config.vocab_size,
        layout=source.layout if isinstance(source, WithLayout) else None,
    )
    (to / "tokenizer").mkdir()
    tokenizer.save(to / "tokenizer")


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


def _sample(scans: Sequence[Path], repeated: Sequence[np.ndarray]) -> Iterator[str]:
    for scan, mask_N in zip(scans, repeated, strict=True):
        with open(scan / "sample.jsonl") as file:
            for line in file:
                row, text = json.loads(line)
                if not mask_N[row]:
                    yield text


def fitted_tokenizer(fitted: Path) -> Tokenizer:
    """What `fit` has made."""
    return load_tokenizer(next((fitted / "tokenizer").iterdir()))


def encode(
    config: PrepareConfig, source: Source, part: Part, scanned: Path, fitted: Path, number: int, to: Path
) -> None:
    """Shards of one part's records, by split."""
    tokenizer, tally = fitted_tokenizer(fitted), Tally(refuse=config.on_dirty == "refuse")
    hashes_N, repeated_N = np.load(scanned / "hashes.npy"), np.load(_repeated(fitted, number))

    def rows() -> Iterator[tuple[str, Row]]:
        with open(scanned / "records.jsonl") as file:
            for line, hash_, repeated in zip(file, hashes_N.tolist(), repeated_N.tolist(), strict=True):
                if repeated:
                    tally.leave_out("duplicate")
                    continue
                record = _from_json(line)
                split = _split(config, source, part, record, hash_.to_bytes(8, "big"))
                for version in _versions(config, source, split, record):
                    try:
                        sequences = _sequences(config, source, version, tokenizer)
                    except _Unusable as error:
                        tally.drop(error.reason, f"{source.name}: {error}")
                        continue
                    tally.counts["kept" if version is record else "mirrored"] += 1
                    for sequence in sequences:
                        yield split, Row(sequence, record.label)

    write_piece(to, rows(), tokenizer, describe(config, source), config.shard_mb << 20)
    (to / "counts.json").write_text(json.dumps({"counts": tally.counts}))


class _Unusable(ValueError):
    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def _versions(config: PrepareConfig, source: Source, split: str, record: Record) -> Iterator[Record]:
    """A record, and behind it its mirror image, if they are wanted: after the split, which must not part the two."""
    yield record
    if config.flips and split == "train":
        assert isinstance(source, WithLayout)
        assert isinstance(record.content, bytes)
        yield replace(record, content=source.layout.mirrored(record.content))


def _sequences(config: PrepareConfig, source: Source, record: Record, tokenizer: Tokenizer) -> list[list[int]]:
    """The sequences of a record. Raises _Unusable."""
    try:
        ids = tokenizer.encode(record.content)
    except UnknownSymbol as error:
        raise _Unusable("unknown symbol", str(error)) from error
    if source.whole_records and not isinstance(tokenizer, OwnFraming) and len(ids) > config.length - 2:
        raise _Unusable("too long", f"{record.content[:80]!r} has {len(ids)} tokens")
    return wrap(ids, config.length, tokenizer)


def describe(
    config: PrepareConfig, source: Source, described: dict[str, Any] | None = None, counts: dict[str, int] | None = None
) -> Description:
    """What the manifest is to say."""
    return Description(
        source.name, config.length, config.pad_policy, config.bos_policy, described or {}, counts or {}, source.labels
    )


def total_counts(files: Sequence[Path]) -> dict[str, int]:
    """Counts of all parts together, sorted by name."""
    total = Counter[str]()
    for file in files:
        total.update(json.loads(file.read_text())["counts"])
    return dict(sorted(total.items()))


def splits_of(source: Source) -> tuple[str, ...]:
    """The splits of a data set: `SPLITS`, and further ones that the source publishes."""
    return (*SPLITS, *(name for name in source.published if name not in SPLITS))


def _split(config: PrepareConfig, source: Source, part: Part, record: Record, digest: bytes) -> str:
    """Published splits stand, but for those of `SPLITS` that nobody has published: a hash takes them out of train.

    It is that of the record's group or, without one, of its content.
    """
    if part.split is not None and part.split != "train":
        return part.split
    if record.group is not None:
        digest = hashlib.sha256(record.group.encode()).digest()
    validation, test = (
        0.0 if name in source.published else fraction
        for name, fraction in (("validation", config.validation_fraction), ("test", config.test_fraction))
    )
    return split_of_hash(int.from_bytes(digest[:8], "big"), validation, test)


def split_of(content: str, validation_fraction: float, test_fraction: float) -> str:
    """The split of a record: a hash of its text, so that it never changes when records are added or reordered."""
    return split_of_hash(int.from_bytes(_digest(Record(content))[:8], "big"), validation_fraction, test_fraction)


def split_of_hash(hash_: int, validation_fraction: float, test_fraction: float) -> str:
    """The split of a record by the first 8 bytes of its SHA-256, or of its group's."""
    u = hash_ / 2**64
    if u < test_fraction:
        return "test"
    return "validation" if u < test_fraction + validation_fraction else "train"


def wrap(ids: Sequence[int], length: int, tokenizer: Tokenizer) -> list[list[int]]:
    """`[BOS] ids [EOS]`, cut into as many sequences of at most `length` as it takes (MDLM's chunks).

    Of a tokenizer that frames in its own way: one sequence.
    """
    if isinstance(tokenizer, OwnFraming):
        return [tokenizer.frame(ids)]
    size = length - 2
    return [[tokenizer.bos_id, *ids[at : at + size], tokenizer.eos_id] for at in range(0, len(ids), size)]
