"""The first passes over a corpus, part by part: hash its files, and find its records.

Each function writes its result into a directory of its own. It depends on nothing but the corpus and the settings.

Legend: N records of a part.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.records import Part, Record, Source, Tally
from scmdm.data.preparation.splits import leading_bits, split_of
from scmdm.data.tokenizers import Content, UnknownSymbol, learns_from_text, symbols_of
from scmdm.system.files import sha256_file

_SAMPLE_BYTES = 1 << 28  # of text that sentencepiece is trained on, at most; it holds all of it in memory


def hash_files(source: Source, part: Part, to: Path) -> None:
    """SHA-256 of the whole files of a part."""
    files = source.files()
    hashes = {piece.file: sha256_file(files[piece.file]) for piece in part.slices}
    (to / "hashes.json").write_text(json.dumps(hashes))


def scan(config: PrepareConfig, source: Source, part: Part, on_read: Callable[[int], None], to: Path) -> None:
    """Clean records with their hashes, what was left out, and what making a tokenizer needs."""
    tally = Tally(refuse=config.on_dirty == "refuse", on_read=on_read)
    learns = config.tokenizer_path is None and learns_from_text(config.tokenizer)
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
            row, hash_ = len(hashes), leading_bits(digest)
            hashes.append(hash_)
            records.write(_to_json(record) + "\n")
            # What is held out at the end of the corpus is known when all parts have been counted.
            if not learns or (
                config.held_out_last is None and split_of(config, source, part, record, hash_) != "train"
            ):
                continue
            if leading_bits(digest[8:]) < sampled * 2**64:
                sample.write(json.dumps([row, record.text]) + "\n")
    hashes_N = np.array(hashes, np.uint64)
    order_N = np.argsort(hashes_N, kind="stable")
    for name, values in (("hashes", hashes_N), ("sorted", hashes_N[order_N]), ("order", order_N)):
        np.save(to / f"{name}.npy", values)
    (to / "scan.json").write_text(json.dumps({"counts": tally.counts, "symbols": sorted(symbols)}))


def scanned_records(directory: Path) -> Iterator[Record]:
    """The records that `scan` has found, in their order."""
    with open(directory / "records.jsonl") as file:
        yield from map(_from_json, file)


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
    text: Content = record.text
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).digest()


def _to_json(record: Record) -> str:
    rest = (record.label, record.group, record.prompt)
    if isinstance(record.content, bytes):
        return json.dumps([1, base64.b64encode(record.content).decode(), *rest])
    return json.dumps([0, record.content, *rest])


def _from_json(line: str) -> Record:
    raw, content, label, group, prompt = json.loads(line)
    return Record(base64.b64decode(content) if raw else content, label, group, prompt)
