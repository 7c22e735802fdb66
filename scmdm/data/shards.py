"""Writing a data set: MDS shards by mosaicml-streaming and a manifest, complete or absent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from scmdm.data.dataset import COLUMN
from scmdm.data.manifest import (
    MANIFEST_FILE,
    VERSION,
    FileInfo,
    Manifest,
    SplitInfo,
    TokenizerRef,
    check_dataset,
    remote_of,
)
from scmdm.data.tokenizers import Tokenizer
from scmdm.errors import UserError
from scmdm.files import atomic_directory, sha256_file


@dataclass(frozen=True)
class Description:
    """What the manifest says besides the shards."""

    name: str
    length: int
    pad_policy: str
    bos_policy: str
    source: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)


def is_up_to_date(root: Path, source: dict[str, Any], overwrite: bool) -> bool:
    """Whether `root` already holds this data set, at a glance whole.

    UserError when it holds something else and may not be replaced; what is not a data set may never be.
    """
    if not root.exists():
        return False
    if not (root / MANIFEST_FILE).is_file():
        raise UserError(f"out={root} exists and is not a data set; choose another out, or remove it")
    if (remote := remote_of(root)) is not None:
        raise UserError(f"out={root} is a cache of {remote}; choose another out")
    if overwrite:
        return False
    if Manifest.read(root).source == source:
        check_dataset(root)
        return True
    raise UserError(f"out={root} holds a data set made with other settings; choose another out, or set overwrite=true")


def write_dataset(
    root: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Sequence[Sequence[int]]],
    description: Description,
    *,
    shard_bytes: int,
    overwrite: bool = False,
) -> Manifest:
    """Write padded sequences of each split under `root`; nothing appears there until all of it is written.

    Raises UserError for an empty split.
    """
    for name, sequences in splits.items():
        if not sequences:
            raise UserError(f"split {name} of {description.name} is empty; give more data or a larger fraction")
    with atomic_directory(root, replace=overwrite) as temporary:
        file = tokenizer.save(temporary)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        infos = {
            name: _write_split(temporary, name, sequences, tokenizer, description, dtype, shard_bytes)
            for name, sequences in splits.items()
        }
        manifest = _manifest(tokenizer, file, infos, description, dtype)
        manifest.write(temporary)
    return manifest


def _write_split(
    root: Path,
    name: str,
    sequences: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    description: Description,
    dtype: str,
    shard_bytes: int,
) -> SplitInfo:
    columns = {COLUMN: f"ndarray:{dtype}:{description.length}"}
    not_padding = 0
    with MDSWriter(out=str(root / name), columns=columns, hashes=["sha1"], size_limit=shard_bytes) as writer:
        for row_L in _padded(sequences, tokenizer.pad_id, description.length, dtype):
            not_padding += int((row_L != tokenizer.pad_id).sum())
            writer.write({COLUMN: row_L})
    tokens = not_padding if description.pad_policy == "ignore" else len(sequences) * description.length
    if description.bos_policy == "given":
        tokens -= len(sequences)
    files = [
        FileInfo(f"{name}/{path.name}", path.stat().st_size, sha256_file(path))
        for path in sorted((root / name).iterdir())
    ]
    return SplitInfo(len(sequences), tokens, files)


def _padded(sequences: Sequence[Sequence[int]], pad_id: int, length: int, dtype: str) -> Iterator[np.ndarray]:
    for sequence in sequences:
        row_L = np.full(length, pad_id, dtype)
        row_L[: len(sequence)] = sequence
        yield row_L


def _manifest(
    tokenizer: Tokenizer, file: Path, splits: dict[str, SplitInfo], description: Description, dtype: str
) -> Manifest:
    return Manifest(
        version=VERSION,
        name=description.name,
        tokenizer=TokenizerRef(tokenizer.kind, file.name, sha256_file(file)),
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        length=description.length,
        dtype=dtype,
        pad_policy=description.pad_policy,
        bos_policy=description.bos_policy,
        splits=splits,
        source=description.source,
        counts=description.counts,
    )
