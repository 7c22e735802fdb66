"""Files of a published model, which are untrusted: the configuration, and tensors read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from scmdm.convert.lightning import checkpoint_weights, hyper_parameters, read_checkpoint
from scmdm.errors import UserError
from scmdm.models.safetensors_headers import (
    LARGEST_JSON,
    SUFFIX,
    StoredTensor,
    published_tensors,
    read_header,
    require_finite,
)
from scmdm.system.untrusted import read_json, reading

CONFIG_FILE = "config.json"
_REMEDY = "download it again"


class Tensors(Protocol):
    """Tensors by name, grouped by file."""

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all tensors by name."""
        ...

    def groups(self) -> list[list[str]]:
        """Names, grouped by file."""
        ...

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors of one group."""
        ...


@dataclass(frozen=True)
class PublishedFiles:
    """A published model: its configuration (empty if it has none) and its tensors."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors


def open_source(path: Path, weights: str) -> PublishedFiles:
    """Open a directory of safetensors files with `config.json`, one safetensors file, or a Lightning checkpoint.

    `weights` ("ema" or "raw") applies to Lightning checkpoints: see `checkpoint_weights`. Raises UserError for a file
    that cannot be read safely.
    """
    if path.is_dir():
        return PublishedFiles(path, read_config(path / CONFIG_FILE), _Files(published_tensors(path)))
    if path.suffix == SUFFIX:
        return PublishedFiles(path, read_config(path.parent / CONFIG_FILE), _Files(read_header(path).tensors))
    content = read_checkpoint(path)
    return PublishedFiles(
        path, hyper_parameters(path, content), _Loaded(path, checkpoint_weights(path, content, weights))
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty for a missing file. Raises UserError."""
    try:
        content = read_json(path, limit=LARGEST_JSON, remedy=_REMEDY)
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; {_REMEDY}")
    return content


class _Files:
    """Tensors of safetensors files, opened one at a time."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def groups(self) -> list[list[str]]:
        files: dict[Path, list[str]] = {}
        for name, tensor in self._tensors.items():
            files.setdefault(tensor.file, []).append(name)
        return list(files.values())

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        path = self._tensors[names[0]].file
        for name in names:
            _ = self._tensors[name].dtype  # refuses what is not floating-point
        with reading(path, "safetensors file", _REMEDY), safe_open(path, framework="pt") as opened:
            for name in names:
                value = opened.get_tensor(name)
                require_finite(name, value, path)
                yield name, value


class _Loaded:
    """Tensors of a Lightning checkpoint, mapped into memory."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._path, self._tensors = path, tensors

    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self._tensors.items()}

    def groups(self) -> list[list[str]]:
        return [list(self._tensors)]

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            value = self._tensors[name].detach()
            require_finite(name, value, self._path)
            yield name, value
