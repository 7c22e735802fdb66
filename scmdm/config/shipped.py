"""Configurations and models that come with scmdm, found by name from any working directory.

Their names begin with `configs/`. A file of that name in the working directory wins; a wheel has them in
`scmdm/configs`, a checkout in `configs` beside the package.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from scmdm.config.fields import is_path
from scmdm.errors import UserError

FOLDER = "configs"
MODEL_FILE = "model.json"  # marks a directory as a model
SCORER_FILE = "scorer.json"  # marks a directory as a scorer of text, for metrics.scorer
_SIMILAR, _SIMILARITY = 3, 0.7  # names in a message, and how similar they are


def shipped_root() -> Path:
    """Folder of the shipped configurations."""
    package = Path(__file__).resolve().parents[1]
    installed = package / FOLDER
    return installed if installed.is_dir() else package.parent / FOLDER


def open_input(name: str, path: Path) -> Path:
    """Locate an input, which must be a file or a directory if it exists: reading a FIFO or a device may never end.

    `name` is that of the key or argument, for the error message.
    """
    found = locate(path)
    try:
        mode = found.stat().st_mode
    except OSError:  # no such file, or not a path: the reader reports it
        return found
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{name}={path} is not possible: it is neither a file nor a directory; save it as a file")
    return found


def locate(path: Path) -> Path:
    """Return the shipped file or directory named `path` unless the working directory has one of that name."""
    name = _name_below(path)
    if name is None or os.path.lexists(path):
        return path
    shipped = shipped_root().joinpath(*name)
    return shipped if shipped.exists() else path


def shipped_input(name: str) -> Path | None:
    """Return the place of the shipped file or directory that `name` means; None if it means another, or none."""
    found = locate(Path(name)) if is_path(name) else None
    own = found is not None and Path(os.path.realpath(found)).is_relative_to(shipped_root())
    return found if own and found is not None and found.exists() else None


def explain_missing(path: Path) -> str:
    """Say that `path` does not exist, where it was sought, and which shipped names are similar."""
    places = f", neither here nor in {shipped_root()}" if _name_below(path) is not None else ""
    near = difflib.get_close_matches(str(path), shipped_names(), n=_SIMILAR, cutoff=_SIMILARITY)
    similar = f" (similar: {', '.join(near)}; see `scmdm configs`)" if near else ""
    return f"{path} does not exist{places}{similar}"


def shipped_names() -> dict[str, Path]:
    """Map the name of each shipped configuration, model and scorer to its place, sorted by name."""
    return dict(sorted((f"{FOLDER}/{path.relative_to(shipped_root())}", path) for path in _walk(shipped_root())))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix == ".yaml" or any((path / mark).is_file() for mark in (MODEL_FILE, SCORER_FILE)):
            yield path
        elif path.is_dir():
            yield from _walk(path)


def _name_below(path: Path) -> tuple[str, ...] | None:
    """Parts of a name below `configs/`; None if `path` is no such name."""
    plain = not path.is_absolute() and path.parts[:1] == (FOLDER,) and ".." not in path.parts
    return path.parts[1:] if plain else None
