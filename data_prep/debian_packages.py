"""Corpora in Debian packages, downloaded once with apt-get and unpacked, but not installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scmdm.errors import UserError


@contextmanager
def unpacked_package(package: str, instead: str) -> Iterator[Path]:
    """Download and unpack a package into a temporary folder, which is the value of the context.

    Raises UserError, which ends with `instead`, when apt-get cannot download it.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(f"{package} is downloaded with Debian's apt-get, which is not installed; {instead}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        _run(["apt-get", "download", package], place, f"run `apt-get update`, or {instead}")
        _run(["dpkg-deb", "--extract", next(place.glob("*.deb")).name, "unpacked"], place, instead)
        yield place / "unpacked"


def copy_file(package: str, source: Path, target: Path, instead: str) -> None:
    """Copy a file of an unpacked package. Raises UserError if this version of the package has no such file."""
    if not source.is_file():
        raise UserError(f"this system's {package} has no {source.name}; {instead}")
    shutil.copyfile(source, target)


def _run(command: list[str], place: Path, remedy: str) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"`{' '.join(command)}` failed: {reason}; {remedy}")
