"""Write tensors into safetensors files of limited size, with at most one file's tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from scmdm.models.safetensors_writer import write_file
from scmdm.system.files import atomic_write_text
from scmdm.system.hashing import FileHash

_METADATA = {"format": "pt"}


def write_shards(
    path: Path, tensors: Iterable[tuple[str, Tensor]], limit: int, *, index: bool = False
) -> dict[str, FileHash]:
    """Write tensors to `path`, or to `NAME-00001-of-00003.safetensors`, ... if they exceed `limit` bytes.

    `index` also writes `NAME.safetensors.index.json` in the second case, as on the Hugging Face hub. Each file holds at
    least one tensor. Returns the hash of each file of tensors by name.
    """
    file_of: dict[str, int] = {}
    total, size, batch, hashes = 0, 0, dict[str, Tensor](), list[FileHash]()
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > limit:
            hashes.append(write_file(_part(path, len(hashes)), batch, _METADATA))
            size, batch = 0, {}
        # Copy: pages of a mapped file would stay in memory.
        batch[name] = tensor.detach().cpu().contiguous().clone()
        file_of[name], size, total = len(hashes), size + tensor.nbytes, total + tensor.nbytes
    hashes.append(write_file(_part(path, len(hashes)), batch, _METADATA))
    count = len(hashes)
    names = [path.name] if count == 1 else [f"{path.stem}-{i + 1:05}-of-{count:05}{path.suffix}" for i in range(count)]
    for number, name in enumerate(names):
        _part(path, number).rename(path.with_name(name))
    if index and count > 1:
        content = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[part] for name, part in file_of.items()},
        }
        atomic_write_text(path.with_name(f"{path.name}.index.json"), json.dumps(content, indent=2) + "\n")
    return dict(zip(names, hashes, strict=True))


def _part(path: Path, number: int) -> Path:
    return path.with_name(f".{path.stem}.{number}")
