"""First passes over a corpus, part by part: hash the files, and read the records.

Each function writes its result into a directory of its own. Results depend on corpus and configuration alone.

Legend: N records of a part.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from scmdm.config.preparation import TOKENIZERS, PrepareConfig
from scmdm.data.preparation.records import Part, Record, Tally
from scmdm.data.preparation.source import Source
from scmdm.data.preparation.splits import by_position, leading_bits, split_of
from scmdm.data.tokenizers import Content, Tokenizer, UnknownSymbol
from scmdm.system.files import sha256_file
from scmdm.system.untrusted import reading

_FEW_GROUPS = 100  # more seldom leave a split empty
_SAMPLE_BYTES = 1 << 28  # of text that a tokenizer is trained on, which it may hold in memory


def hash_files(source: Source, part: Part, to: Path) -> None:
    """Hash the whole files of a part with SHA-256."""
    files = source.files()
    hashes = {}
    for piece in part.slices:
        with reading(files[piece.file], "file of the corpus"):
            hashes[piece.file] = sha256_file(files[piece.file])
    (to / "hashes.json").write_text(json.dumps(hashes))


def sampled_share(config: PrepareConfig, source: Source) -> float:
    """Return the share of the training records that the tokenizer is trained on; 0 if it is not trained."""
    tokenizer: type[Tokenizer] = TOKENIZERS.load(config.tokenizer.name)
    if not tokenizer.learns_from_text or getattr(config.tokenizer, "path", None) is not None:
        return 0.0
    return min(1.0, _SAMPLE_BYTES / max(1, sum(path.stat().st_size for path in source.files().values())))


def scan(
    config: PrepareConfig, source: Source, part: Part, sampled: float, on_read: Callable[[int], None], to: Path
) -> None:
    """Write the clean records of a part with their hashes, its counts, and the input for building a tokenizer.

    `sampled` is `sampled_share` of the corpus.
    """
    tally = Tally(refuse=config.on_dirty == "refuse", on_read=on_read)
    tokenizer: type[Tokenizer] = TOKENIZERS.load(config.tokenizer.name)
    hashes: list[int] = []
    symbols: set[str] = set()
    with open(to / "records.jsonl", "w") as records, open(to / "sample.jsonl", "w") as sample:
        for record in _limited(source.records(part, tally), config.limit):
            try:
                symbols.update(tokenizer.symbols_of(record.text))
            except UnknownSymbol as error:
                tally.drop(error.reason, partial(describe_place, source, part, record, error))
                continue
            digest = _digest(record)
            row, hash_ = len(hashes), leading_bits(digest)
            hashes.append(hash_)
            records.write(_to_json(record) + "\n")
            # Which records are held out by their positions is known only after all parts have been counted.
            if not sampled or (not by_position(config) and split_of(config, source, part, record, hash_) != "train"):
                continue
            if leading_bits(digest[8:]) < sampled * 2**64:
                sample.write(json.dumps([row, record.text]) + "\n")
    hashes_N = np.array(hashes, np.uint64)
    order_N = np.argsort(hashes_N, kind="stable")
    for name, values in (("hashes", hashes_N), ("sorted", hashes_N[order_N]), ("order", order_N)):
        np.save(to / f"{name}.npy", values)
    (to / "scan.json").write_text(
        json.dumps({"counts": tally.counts, "places": tally.places, "symbols": sorted(symbols)})
    )


def scanned_records(directory: Path) -> Iterator[Record]:
    """Yield the records of a part that `scan` has written, in order."""
    with open(directory / "records.jsonl") as file:
        yield from map(_from_json, file)


def describe_groups(scans: Sequence[Path]) -> str:
    """Describe the groups of all records if they are too few for several splits, for a message; else return nothing."""
    groups: set[str] = set()
    for record in (record for scan in scans for record in scanned_records(scan)):
        if record.group is None or len(groups) > _FEW_GROUPS:
            return ""
        groups.add(record.group)
    shown = ", ".join(map(repr, sorted(groups)[:3])) + (", ..." if len(groups) > 3 else "")
    return (
        f": there are {len(groups)} groups, each of which is in one split ({shown}; of genomes: id of the sequence and "
        "number of the block, so give each sequence its own id, or lower source.block_windows)"
    )


def describe_place(source: Source, part: Part, record: Record, error: Exception | None = None) -> str:
    """Return the file of a record and its number among those that the source can read, with the error that it raised.

    The part is read again.
    """
    problem = f": {error}" if error is not None else ""
    wanted, files = _digest(record), source.files()
    for piece in part.slices:
        records = source.records(replace(part, slices=(piece,)), Tally())
        number = next((number for number, found in enumerate(records, start=1) if _digest(found) == wanted), None)
        if number is not None:
            after = f" after byte or row {piece.start:,}" if piece.start else ""
            return f"{files.get(piece.file, piece.file)}, record {number:,} of the readable ones{after}{problem}"
    return f"{source.name}{problem}"


def _limited(records: Iterator[Record], limit: int | None) -> Iterator[Record]:
    """Yield records up to the `limit`-th distinct one."""
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
    text: Content = record.text
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).digest()


def _to_json(record: Record) -> str:
    rest = (record.label, record.group, record.prompt, record.is_chat)
    if isinstance(record.content, bytes):
        return json.dumps([1, base64.b64encode(record.content).decode(), *rest])
    return json.dumps([0, record.content, *rest])


def _from_json(line: str) -> Record:
    raw, content, *rest = json.loads(line)
    return Record(base64.b64decode(content) if raw else content, *rest)
