"""Verification of every byte of a prepared data set: `scmdm prepare --verify`.

Legend: N samples, L length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scmdm.data.loader import read_split
from scmdm.data.manifest import MANIFEST_FILE, Manifest, file_problems, remote_of


def verify_dataset(root: Path) -> list[str]:
    """List the problems of a data set, each with its file. Checks the hashes of all files, then the ids in the shards.

    A cache of a remote data set may lack files; ids are checked only in complete splits.
    """
    problems = file_problems(root, hashes=True)
    if problems:
        return problems
    manifest, cached = Manifest.read(root), remote_of(root) is not None
    whole = [
        name
        for name, split in manifest.splits.items()
        if not cached or all((root / file.file).is_file() for file in split.files)
    ]
    return [problem for name in whole for problem in _verify_ids(root, name, manifest)]


def _verify_ids(root: Path, split: str, manifest: Manifest) -> Iterator[str]:
    ids_NL: np.ndarray = read_split(root, split)
    expected = (manifest.splits[split].samples, manifest.length)
    if ids_NL.shape != expected:
        yield f"{root / split} holds ids of shape {ids_NL.shape}, but {MANIFEST_FILE} gives {expected}"
    elif ids_NL.max() >= manifest.vocab_size:
        yield f"{root / split} holds id {ids_NL.max()}, but the vocabulary ends at {manifest.vocab_size - 1}"
    elif (ids_NL == manifest.mask_id).any():
        yield f"{root / split} holds the mask id {manifest.mask_id} as data"
