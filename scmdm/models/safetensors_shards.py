"""Write tensors into safetensors files of limited size, with at most one file's tensors in memory."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from scmdm.system.files import atomic_write_text


def write_shards(path: Path, tensors: Iterable[tuple[str, Tensor]], limit: int, *, index: bool = False) -> None:
    """Write tensors to `path`, or to `NAME-00001-of-00003.safetensors`, ... if they exceed `limit` bytes.

    `index` also writes `NAME.safetensors.index.json` in the second case, as on the Hugging Face hub. Each file holds at
    least one tensor.
    """
    file_of: dict[str, int] = {}
    total, size, count, batch = 0, 0, 0, dict[str, Tensor]()
    for name, tensor in tensors:
        if batch and size + tensor.nbytes > limit:
            _write(_part(path, count), batch)
            count, size, batch = count + 1, 0, {}
        # Copy: safetensors refuses views of a shared storage, and pages of a mapped file would stay in memory.
        batch[name] = tensor.detach().cpu().contiguous().clone()
        file_of[name], size, total = count, size + tensor.nbytes, total + tensor.nbytes
    _write(_part(path, count), batch)
    count += 1
    names = [path.name] if count == 1 else [f"{path.stem}-{i + 1:05}-of-{count:05}{path.suffix}" for i in range(count)]
    for number, name in enumerate(names):
        _part(path, number).rename(path.with_name(name))
    if index and count > 1:
        content = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[part] for name, part in file_of.items()},
        }
        atomic_write_text(path.with_name(f"{path.name}.index.json"), json.dumps(content, indent=2) + "\n")


def _part(path: Path, number: int) -> Path:
    return path.with_name(f".{path.stem}.{number}")


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, too
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # safetensors creates files that only their owner can read
