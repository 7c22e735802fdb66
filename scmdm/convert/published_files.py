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
from scmdm.models.safetensors_headers import SUFFIX, merge_headers, read_header, require_finite
from scmdm.system.untrusted import name_inside, parse_as, read_json, reading

CONFIG_FILE, SINGLE_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 2**26  # bytes
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
        return PublishedFiles(path, read_config(path / CONFIG_FILE), _Files(path, _files_of(path)))
    if path.suffix == SUFFIX:
        return PublishedFiles(path, read_config(path.parent / CONFIG_FILE), _Files(path.parent, [path]))
    content = read_checkpoint(path)
    return PublishedFiles(
        path, hyper_parameters(path, content), _Loaded(path, checkpoint_weights(path, content, weights))
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty for a missing file. Raises UserError."""
    try:
        content = read_json(path, limit=_LARGEST_JSON, remedy=_REMEDY)
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; {_REMEDY}")
    return content


@dataclass(frozen=True)
class _Index:
    """Content of an index of weights files; the metadata is not used."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def _read_index(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor; empty without an index. Raises UserError for names outside the directory."""
    path = directory / INDEX_FILE
    content = read_config(path) if path.exists() or path.is_symlink() else None
    if content is None:
        return {}
    index = parse_as(_Index, content, path, _REMEDY)
    if not index.weight_map:
        raise UserError(f"{path} has an empty weight_map; {_REMEDY}")
    files = {file: _named_file(directory, file) for file in sorted(set(index.weight_map.values()))}
    return {name: files[file] for name, file in index.weight_map.items()}


def _named_file(directory: Path, name: str) -> Path:
    """Return the weights file that the index calls `name`. Raises UserError for any other place or kind of file."""
    path = directory / INDEX_FILE
    if "/" in name or not name.endswith(SUFFIX):
        raise UserError(f"{path} names a file {name!r}, which is no {SUFFIX} file of this directory; {_REMEDY}")
    if directory.parent.name == "snapshots":  # the hub's cache, whose files are links into the folder `blobs`
        name_inside(directory.parent.parent, f"snapshots/{directory.name}/{name}", path)
        return directory / name
    return name_inside(directory, name, path)


def _files_of(directory: Path) -> list[Path]:
    """Paths of the weights files, from the index or the single file."""
    listed = sorted(set(_read_index(directory).values()))
    if not listed and not (directory / SINGLE_FILE).is_file():
        raise UserError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a directory with the weights")
    return listed or [directory / SINGLE_FILE]


class _Files:
    """Safetensors files of one directory, opened one at a time."""

    def __init__(self, directory: Path, files: list[Path]) -> None:
        self._directory = directory
        self._tensors = merge_headers([read_header(path) for path in files])
        if len(files) > 1:
            self._check_index()

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

    def _check_index(self) -> None:
        """Raise UserError unless the index lists exactly the tensors of the files, each in its file."""
        path = self._directory / INDEX_FILE
        listed = _read_index(self._directory)
        for name, file in listed.items():
            if name not in self._tensors or self._tensors[name].file != file:
                raise UserError(f"{path} says that {name} is in {file.name}, which does not have it; {_REMEDY}")
        for name, tensor in self._tensors.items():
            if name not in listed:
                raise UserError(f"{path} does not list {name}, which is in {tensor.file.name}; {_REMEDY}")


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
