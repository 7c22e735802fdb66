"""The seal of a checkpoint or export: `checkpoint.json`, written last, with every file's size and SHA-256."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scmdm.system.files import atomic_write_text, sha256_file

SEAL = "checkpoint.json"


def seal(directory: Path) -> None:
    """Hash every file below `directory` and write the seal."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in paths}
    atomic_write_text(directory / SEAL, _seal_text({"files": files}))


def verify_checkpoint(path: Path, *, hashes: bool = True) -> list[str]:
    """List the problems of a checkpoint or export, each naming the file; empty if it is undamaged.

    Without `hashes` only the existence and the size of files are checked.
    """
    try:
        text = (path / SEAL).read_text()
        content = json.loads(text)
        files = content["files"]
    except (OSError, json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        return [f"{path / SEAL} is missing or damaged ({type(error).__name__})"]
    if text != _seal_text(content):
        return [f"{path / SEAL} was changed after it was written"]
    return [problem for name, expected in files.items() if (problem := _verify_file(path / name, expected, hashes))]


def sha256_of_model(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's or export's seal, which identifies the model."""
    return sha256_file(path / SEAL)


def _seal_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _verify_file(path: Path, expected: dict[str, Any], hashes: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    if hashes and sha256_file(path) != expected["sha256"]:
        return f"{path} does not match its SHA-256"
    return None
