"""Files of a published model, which are untrusted: the configuration, and tensors read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmdm.convert.lightning import checkpoint_weights, hyper_parameters, read_checkpoint
from scmdm.errors import UserError

CONFIG_FILE, SINGLE_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 2**26  # bytes


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
        return PublishedFiles(path, read_json(path / CONFIG_FILE, required=False), _Files(path, _files_of(path)))
    if path.suffix == ".safetensors":
        return PublishedFiles(
            path, read_json(path.parent / CONFIG_FILE, required=False), _Files(path.parent, [path.name])
        )
    content = read_checkpoint(path)
    return PublishedFiles(path, hyper_parameters(content), _Loaded(checkpoint_weights(path, content, weights)))


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Read a JSON object; empty for a missing file unless `required`. Raises UserError."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes; expected at most {_LARGEST_JSON}: download it again"
            )
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        if not required:
            return {}
        raise UserError(f"{path} is missing; download the whole model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return content


def _files_of(directory: Path) -> list[str]:
    """Names of the weights files, from the index or the single file."""
    if not (directory / INDEX_FILE).is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise UserError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a directory with the weights"
            )
        return [SINGLE_FILE]
    listed = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{directory / INDEX_FILE} has no `weight_map`; download it again")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{directory / INDEX_FILE}: {name} is in {file!r}, which is not a file of this directory; "
                "download it again"
            )
    return sorted(set(listed.values()))


class _Files:
    """Safetensors files of one directory, opened one at a time."""

    def __init__(self, directory: Path, files: list[str]) -> None:
        self._directory, self._where = directory, dict[str, str]()
        self._shapes: dict[str, torch.Size] = {}
        for file in files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    if name in self._where:
                        raise UserError(
                            f"{directory}: {name} is in {self._where[name]} and in {file}; remove one of the files"
                        )
                    self._where[name] = file
                    self._shapes[name] = torch.Size(opened.get_slice(name).get_shape())
        self._check_index()

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    def groups(self) -> list[list[str]]:
        files: dict[str, list[str]] = {}
        for name, file in self._where.items():
            files.setdefault(file, []).append(name)
        return list(files.values())

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        with self._open(self._where[names[0]]) as opened:
            for name in names:
                yield name, opened.get_tensor(name)

    def _check_index(self) -> None:
        """Raise UserError unless each tensor is in the file that the index names."""
        path = self._directory / INDEX_FILE
        listed = read_json(path, required=False).get("weight_map", {})
        for name, file in listed.items() if len(set(self._where.values())) > 1 else ():
            if self._where.get(name) != file:
                raise UserError(f"{path} says that {name} is in {file}, which does not have it; download it again")

    def _open(self, file: str) -> Any:
        path = self._directory / file
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not a complete safetensors file ({reason}); download it again") from error


class _Loaded:
    """Tensors of a Lightning checkpoint, mapped into memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self._tensors.items()}

    def groups(self) -> list[list[str]]:
        return [list(self._tensors)]

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self._tensors[name].detach()
