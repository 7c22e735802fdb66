"""The configuration that a run stored in its directory and in its checkpoints: `config.yaml`, as plain values.

The file may come from a stranger. It is read without interpolation: `${oc.env:NAME}` in it is just text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scmdm.config.fields import shorten
from scmdm.errors import UserError
from scmdm.system.run_directory import CHECKPOINTS, CONFIG_FILE
from scmdm.system.untrusted import parse_yaml, read_bytes, reading

Value = TypeVar("Value")
_LARGEST = 2**22  # bytes


@dataclass(frozen=True)
class StoredConfig:
    """Contents of a `config.yaml`."""

    path: Path
    content: dict[str, Any]

    def get(self, key: str, kind: type[Value]) -> Value | None:
        """Return the value of a dotted key; None if it is null or missing. Raises UserError for another type."""
        value: Any = self.content
        for part in key.split("."):
            if not isinstance(value, dict):
                raise UserError(f"{self.path}: {key} stands below {shorten(value)}, which is not a section")
            value = value.get(part)
            if value is None:
                return None
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.path}: {key}={shorten(value)} is not of the type {kind.__name__}")
        return kind(value) if kind is float else value  # type: ignore[call-arg]

    def need(self, key: str, kind: type[Value]) -> Value:
        """Return the value of a dotted key. Raises UserError if it is null, missing or of another type."""
        value = self.get(key, kind)
        if value is None:
            raise UserError(f"{self.path} does not give {key}; it is not the configuration of a run")
        return value

    def find(self, key: str) -> Path | None:
        """Return the file or directory that a key names, if it still exists.

        A path is looked for as it was stored and, for a tree that was moved as a whole, relative to the run directory.
        """
        name, run = self.get(key, str), self.get("run_dir", str)
        if not name:
            return None
        places = [Path(name)]
        if run and os.path.isabs(name) == os.path.isabs(run):
            places.append(self._run_directory / os.path.relpath(name, run))
        return next((place for place in places if _exists(place)), None)

    @property
    def _run_directory(self) -> Path:
        directory = self.path.absolute().parent
        return directory.parents[1] if directory.parent.name == CHECKPOINTS else directory


def read_stored_config(directory: Path) -> StoredConfig:
    """Read `config.yaml` of a run or a checkpoint. Raises UserError, which names the file, if that is not possible."""
    path = directory / CONFIG_FILE
    with reading(path, "configuration of a run"):
        content = parse_yaml(read_bytes(path, _LARGEST).decode())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} in place of keys")
        if not all(isinstance(name, str) for name in content):
            raise ValueError("a key that is not text")
    return StoredConfig(path, content)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
