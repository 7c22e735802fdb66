"""Files of samples, in the format given by the file's suffix."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scmdm.data.tokenizers import LevelTokenizer, Tokenizer
from scmdm.domains.interface import Domain, GeneratedSamples, WithoutFigures
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_bytes, atomic_write_text
from scmdm.system.untrusted import parse_json_row, read_bytes, reading

_FASTA_WIDTH = 80  # letters per line
_LARGEST_FILE = 2**34
FRAMED_ONLY = (".smi", ".npy")  # suffixes of formats without a place for fragments


def require_sample_format(path: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError if samples of a tokenizer cannot be written in the format of the file's suffix."""
    if path.suffix == ".png" and issubclass(_domain_of(tokenizer), WithoutFigures):
        raise UserError(f"out={path}: samples of a {tokenizer.kind} tokenizer cannot be drawn; give out=NAME.jsonl")
    if path.suffix == ".npy" and not isinstance(tokenizer, LevelTokenizer):
        raise UserError(f"out={path}: samples of a {tokenizer.kind} tokenizer are not codes; give out=NAME.jsonl")


def write_samples(path: Path, generated: GeneratedSamples, tokenizer: Tokenizer) -> None:
    """Write samples to `path`, in the format of its suffix.

    - `.jsonl`: one object per line with `text`, `framed`, `tokens`, `evaluations`, `positions` and, if conditional,
      `label`;
    - `.txt`: one text per line;
    - `.smi`: one molecule per line, only of framed samples;
    - `.fasta`, `.fa`: sequences;
    - `.png`: a picture of the first samples;
    - `.npy`: codes (N, height, width) of framed samples.

    The format is one that `require_sample_format` allows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _rows(generated)
    if path.suffix == ".png":
        _domain_of(tokenizer).draw(rows, tokenizer, path)
    elif path.suffix == ".npy":
        atomic_write_bytes(path, _codes(generated, tokenizer))
    else:
        atomic_write_text(path, "".join(line + "\n" for line in _lines(path.suffix, rows)))


def read_samples(path: Path, seconds: float) -> GeneratedSamples:
    """Read a `.jsonl` file of `write_samples`, whose samples took `seconds` to draw.

    Raises UserError for a file that is damaged.
    """
    with reading(path, "file of samples"):
        rows = [parse_json_row(line) for line in read_bytes(path, limit=_LARGEST_FILE).decode().splitlines()]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return GeneratedSamples(
            tokens=torch.tensor(columns["tokens"], dtype=torch.int64),
            texts=columns["text"],
            framed=columns["framed"],
            counts=columns["evaluations"],
            seconds=seconds,
            labels=columns.get("label"),
            positions=columns.get("positions"),
        )


def _rows(generated: GeneratedSamples) -> list[dict[str, Any]]:
    """One record per sample."""
    columns: dict[str, Sequence[Any]] = {
        "text": generated.texts,
        "framed": generated.framed,
        "tokens": generated.tokens.tolist(),
        "evaluations": generated.counts,
    }
    if generated.positions is not None:
        columns["positions"] = generated.positions
    if generated.labels is not None:
        columns["label"] = generated.labels
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _domain_of(tokenizer: Tokenizer) -> type[Domain]:
    from scmdm.domains.domain_registry import domain_of_tokenizer, load_domain

    return load_domain(domain_of_tokenizer(tokenizer.kind))


def _codes(generated: GeneratedSamples, tokenizer: Tokenizer) -> bytes:
    assert isinstance(tokenizer, LevelTokenizer)
    codes_NHW = tokenizer.codes(generated.tokens[torch.tensor(generated.framed)].numpy())
    buffer = io.BytesIO()
    np.save(buffer, codes_NHW.astype(tokenizer.layout.dtype))
    return buffer.getvalue()


def _lines(suffix: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        if suffix == ".smi":
            if row["framed"]:
                yield row["text"]
        elif suffix in (".fasta", ".fa"):
            label = f" label={row['label']}" if "label" in row else ""
            yield f">sample_{number} evaluations={row['evaluations']} framed={str(row['framed']).lower()}{label}"
            yield from textwrap.wrap(row["text"], _FASTA_WIDTH)
        elif suffix == ".txt":
            yield row["text"]
        else:
            yield json.dumps(row)
