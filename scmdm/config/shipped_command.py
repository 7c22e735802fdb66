"""`scmdm configs`: list and copy the configurations and models that come with scmdm."""

from __future__ import annotations

import shutil
from pathlib import Path

from scmdm.config.shipped import FOLDER, MODEL_FILE, SCORER_FILE, explain_missing, shipped_names, shipped_root
from scmdm.errors import UserError
from scmdm.system.files import atomic_directory, atomic_write_bytes
from scmdm.system.terminal import say
from scmdm.system.untrusted import read_json


def list_shipped() -> None:
    """Print the name of each configuration and model with a line that describes it."""
    names = shipped_names()
    width = max(map(len, names))
    for name, path in names.items():
        say(f"{name:<{width}}  {_description(path)}".rstrip())
    say(f"They are in {shipped_root()}; `scmdm configs copy NAME` copies one to edit it.")


def _description(path: Path) -> str:
    if path.is_dir():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if (path / SCORER_FILE).is_file():
            return f"scorer of text for metrics.scorer, {size / 1e6:.1f} MB"
        adapted = read_json(path / MODEL_FILE, "model")["model"]["self_conditioned"]
        return f"{'adapted' if adapted else 'base'} model, {size / 1e6:.1f} MB"
    first = path.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def copy_shipped(names: list[str], *, to: Path) -> None:
    """Copy what is named, by default everything, into `to/configs`. Raises UserError rather than replace a file."""
    found = [path for name in names or [FOLDER] for path in _chosen(name)]
    copies = {path: to / FOLDER / path.relative_to(shipped_root()) for path in dict.fromkeys(found)}
    for path in copies.values():
        if path.exists():
            raise UserError(f"{path} exists already; remove it, or choose another directory with --to")
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            atomic_write_bytes(copy, path.read_bytes())
            continue
        with atomic_directory(copy) as folder:
            shutil.copytree(path, folder, dirs_exist_ok=True)
    say(f"copied {len(copies)} of {len(shipped_names())} to {to / FOLDER}")


def _chosen(name: str) -> list[Path]:
    """Files and model directories that `name` stands for: one of them, or all in a folder."""
    wanted = name.rstrip("/")
    wanted = wanted if wanted.split("/")[0] == FOLDER else f"{FOLDER}/{wanted}"
    found = [path for known, path in shipped_names().items() if known == wanted or known.startswith(f"{wanted}/")]
    if not found:
        raise UserError(explain_missing(Path(wanted)))
    return found
