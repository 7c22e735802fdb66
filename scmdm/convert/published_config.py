"""Checked reading of a published model's untrusted configuration and shapes."""

from __future__ import annotations

import re

import torch

from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError


class PublishedConfig:
    """Values of a published configuration; each method raises UserError that names the key and the value found."""

    def __init__(self, source: PublishedFiles) -> None:
        self._path, self._content = source.path, source.config

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        """Read a number within bounds; an absent key or null gives `default`. The key is mandatory without default."""
        value = self._content.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise UserError(
                f"{self._path}: {key}={value!r} in its configuration; expected a number from {low} to {high}"
            )
        return value

    def integer(self, key: str, default: int | None = None, high: int = 2**31) -> int:
        """Read a positive integer up to `high`; see `number`."""
        return int(self.number(key, default, 1, high))

    def flag(self, key: str, default: bool = False) -> bool:
        """Read a boolean; an absent key gives `default`."""
        value = self._content.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self._path}: {key}={value!r} in its configuration; expected true or false")
        return value

    def expect(self, key: str, *possible: object) -> None:
        """Refuse a value that selects a computation that scmdm does not implement; an absent key is accepted."""
        value = self._content.get(key)
        if value is not None and value not in possible:
            names = ", ".join(map(repr, possible))
            raise UserError(f"{self._path}: {key}={value!r} in its configuration; scmdm implements only {names}")


def count_blocks(source: PublishedFiles, pattern: str) -> int:
    """Count the blocks by the names of tensors. Raises UserError unless they are numbered 0, 1, 2, ..."""
    numbers = {int(found[1]) for name in source.tensors.shapes() if (found := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise UserError(
            f"{source.path} has no blocks numbered 0, 1, 2, ... ({pattern}); the file is incomplete or not a model"
        )
    return len(numbers)


def matrix_shape(source: PublishedFiles, name: str) -> torch.Size:
    """Return the shape of a published matrix. Raises UserError when it is missing, empty or not a matrix."""
    shape = source.tensors.shapes().get(name)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = "is missing" if shape is None else f"has shape {tuple(shape)}, expected a matrix"
        raise UserError(f"{source.path}: {name} {found}; download the model again")
    return shape
