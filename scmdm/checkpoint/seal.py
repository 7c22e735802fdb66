"""The seal of a checkpoint or export: `checkpoint.json`, written last, with every file's size and SHA-256.

The seal lists exactly the files of the directory, and ends with a hash of that list. A directory is damaged if a listed
file is missing or changed, and also if it holds a file that is not listed, because a reader might take it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text, sha256_file
from scmdm.system.untrusted import name_inside, parse_as, parse_json, read_bytes, reading, require_regular

SEAL = "checkpoint.json"
_LARGEST_SEAL = 2**26  # bytes
# Entries that other programs leave there, and results of earlier versions; none is read as a part of the model.
_OF_OTHERS = re.compile(
    r"(\.git|\.cache|evaluations)/.*|\.git|\.gitattributes|\.gitignore|\.DS_Store|\.nfs[0-9a-f]+", re.DOTALL
)
logger = logging.getLogger("scmdm")


@dataclass(frozen=True)
class SealedFile:
    """Size and hash of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Seal:
    """Contents of `checkpoint.json`."""

    files: dict[str, SealedFile]  # by path, relative to the directory
    sha256: str | None = None  # of the list of files; None in seals of earlier versions

    def text(self) -> str:
        """The only text that is accepted for this content."""
        content = asdict(self)
        if self.sha256 is None:
            del content["sha256"]
        return json.dumps(content, indent=2) + "\n"

    def digest(self) -> str:
        """Hash the list of files."""
        files = asdict(self)["files"]
        return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(directory: Path) -> None:
    """Hash every file below `directory` and write the seal."""
    names = [name for name in _names(directory) if name != SEAL]
    paths = {name: directory / name for name in sorted(names)}
    listed = Seal({name: SealedFile(path.stat().st_size, sha256_file(path)) for name, path in paths.items()})
    atomic_write_text(directory / SEAL, Seal(listed.files, listed.digest()).text())


def verify_checkpoint(path: Path, *, hashes: bool = True) -> list[str]:
    """List the problems of a checkpoint or export, each naming the file; empty if it is undamaged.

    Without `hashes` only the existence and the size of files are checked.
    """
    return list(find_problems(path, hashes=hashes))


def find_problems(path: Path, *, hashes: bool = True, needed: Collection[str] = ()) -> Iterator[str]:
    """Yield the problems of a checkpoint or export as they are found; `needed` files must be among those listed.

    Nothing is parsed but the seal. Its own hash is checked first, then names and sizes, and large files come last.
    """
    try:
        with reading(path / SEAL, "seal"):
            found = read_seal(path)
        with reading(path, "checkpoint"):
            yield from (f"{path / name} is missing" for name in needed if name not in found.files)
            yield from _problems(path, found, hashes)
    except UserError as error:
        yield str(error)
        return
    if found.sha256 is None:
        logger.info("%s is the seal of an earlier scmdm and has no hash of its own", path / SEAL)


def read_seal(directory: Path) -> Seal:
    """Read the seal of a directory. Raises UserError when it is not as `seal` writes it."""
    path = directory / SEAL
    text = read_bytes(path, _LARGEST_SEAL).decode()
    found = parse_as(Seal, parse_json(text), path)
    if not found.files:
        raise UserError(f"{path} lists no files")
    if found.text() != text or found.sha256 not in (None, found.digest()):
        raise UserError(f"{path} was changed after it was written")
    return found


def sha256_of_model(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's or export's seal, which identifies the model."""
    return sha256_file(path / SEAL)


def _problems(directory: Path, found: Seal, hashes: bool) -> Iterator[str]:
    for name in _names(directory):
        if name != SEAL and name not in found.files and not _OF_OTHERS.fullmatch(name):
            yield f"{directory / name} is not listed in {SEAL}"
    for name, expected in sorted(found.files.items(), key=lambda item: item[1].bytes):
        try:
            problem = _verify_file(directory, name, expected, hashes)
        except (UserError, OSError) as error:
            problem = f"{directory / name} cannot be read ({getattr(error, 'strerror', None) or error})"
        if problem is not None:
            yield problem


def _verify_file(directory: Path, name: str, expected: SealedFile, hashes: bool) -> str | None:
    path = name_inside(directory, name, directory / SEAL)
    if not os.path.lexists(path):
        return f"{path} is missing"
    size = require_regular(path).st_size
    if size != expected.bytes:
        return f"{path} has {size} bytes instead of {expected.bytes}"
    if hashes and sha256_file(path) != expected.sha256:
        return f"{path} does not match its SHA-256"
    if not hashes and not os.access(path, os.R_OK):
        return f"{path} cannot be read"
    return None


def _names(directory: Path) -> Iterator[str]:
    """Yield the names of everything below a directory but its folders; links to folders are not followed."""
    for folder, folders, files in os.walk(directory, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *links]:
            yield str(Path(folder, name).relative_to(directory))


def _raise(error: OSError) -> NoReturn:
    raise error
