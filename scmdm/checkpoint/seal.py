"""The seal of a checkpoint or export: `checkpoint.json`, written last, with every file's size and SHA-256.

The seal lists exactly the files of the directory, and ends with a hash of that list. A directory is damaged if a listed
file is missing or changed, and also if it holds a file that is not listed, because a reader might take it. Of a large
file the seal holds the hash of each chunk, so that several processes can verify it together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text, sha256_file
from scmdm.system.hashing import CHUNK_BYTES, FileHash, chunk_ends, hash_file, hash_range
from scmdm.system.untrusted import name_inside, parse_as, parse_json, read_bytes, reading, require_regular

SEAL = "checkpoint.json"
_LARGEST_SEAL = 2**26  # bytes
# Entries that other programs leave there, and results of earlier versions; none is read as a part of the model.
_OF_OTHERS = re.compile(
    r"(\.git|\.cache|evaluations)/.*|\.git|\.gitattributes|\.gitignore|\.DS_Store|\.nfs[0-9a-f]+", re.DOTALL
)
logger = logging.getLogger("scmdm")


@dataclass(frozen=True)
class Seal:
    """Contents of `checkpoint.json`."""

    files: dict[str, FileHash]  # by path, relative to the directory
    chunk_bytes: int | None = None  # None if no file has more than one chunk
    sha256: str | None = None  # of all of the above; None in seals of earlier versions

    def text(self) -> str:
        """The only text that is accepted for this content."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, indent=2) + "\n"

    def digest(self) -> str:
        """Hash the list of files, and the chunk's size if there are chunks."""
        content = asdict(self)
        listed = content["files"] if self.chunk_bytes is None else [self.chunk_bytes, content["files"]]
        return hashlib.sha256(json.dumps(listed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def parts(self, name: str) -> list[SealedPart]:
        """Return the parts of a file that have a hash of their own."""
        file = self.files[name]
        if isinstance(file.sha256, str):
            return [SealedPart(name, 0, file.bytes, file.sha256)]
        ends = chunk_ends(file.bytes, self.chunk_bytes or 1)
        return [SealedPart(name, *where, sha256) for where, sha256 in zip(ends, file.sha256, strict=True)]


@dataclass(frozen=True)
class SealedPart:
    """A range of a file's bytes, and its hash."""

    name: str
    begin: int
    end: int
    sha256: str


def seal(directory: Path, written: Mapping[str, FileHash] | None = None) -> None:
    """Write the seal of a directory.

    With `written`, the hashes of files by their path in it, nothing but the other files directly in the directory is
    read. Without, every file below it is.
    """
    known = dict(written or {})
    found = _names(directory) if written is None else (path.name for path in directory.iterdir() if path.is_file())
    for name in found:
        if name != SEAL and name not in known:
            known[name] = hash_file(directory / name, CHUNK_BYTES)
    chunked = any(isinstance(file.sha256, list) for file in known.values())
    listed = Seal(dict(sorted(known.items())), CHUNK_BYTES if chunked else None)
    atomic_write_text(directory / SEAL, replace(listed, sha256=listed.digest()).text())


def verify_checkpoint(path: Path, *, hashes: bool = True) -> list[str]:
    """List the problems of a checkpoint or export, each naming the file; empty if it is undamaged.

    Without `hashes` only the existence and the size of files are checked. Nothing is parsed but the seal.
    """
    try:
        found = read_seal(path)
        problems = dict(find_wrong_files(path, found))
    except UserError as error:
        return [str(error)]
    left = sorted(found.files.keys() - problems.keys(), key=lambda name: found.files[name].bytes)
    for name in left if hashes else ():
        problem = next(filter(None, (find_wrong_part(path, part) for part in found.parts(name))), None)
        if problem is not None:
            problems[name] = problem
    return list(problems.values())


def find_wrong_files(path: Path, found: Seal, needed: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield name and problem of each file whose name or size is wrong; nothing is hashed.

    Raises UserError when the directory cannot be listed.
    """
    yield from ((name, f"{path / name} is missing") for name in needed if name not in found.files)
    with reading(path, "checkpoint"):
        names = list(_names(path))
    for name in names:
        if name != SEAL and name not in found.files and not _OF_OTHERS.fullmatch(name):
            yield name, f"{path / name} is not listed in {SEAL}"
    for name, expected in sorted(found.files.items(), key=lambda item: item[1].bytes):
        try:
            problem = _check_size(path, name, expected)
        except (UserError, OSError) as error:
            problem = _unreadable(path / name, error)
        if problem is not None:
            yield name, problem


def find_wrong_part(
    directory: Path, part: SealedPart, on_bytes: Callable[[int], object] = lambda _: None
) -> str | None:
    """Return the problem of a part of a file; None if its hash is that of the seal."""
    path = directory / part.name
    try:
        same = hash_range(path, part.begin, part.end, on_bytes) == part.sha256
    except OSError as error:
        return _unreadable(path, error)
    return None if same else f"{path} does not match its SHA-256 (bytes {part.begin} to {part.end})"


def read_seal(directory: Path) -> Seal:
    """Read the seal of a directory. Raises UserError when it is not as `seal` writes it."""
    path = directory / SEAL
    with reading(path, "seal"):
        text = read_bytes(path, _LARGEST_SEAL).decode()
        found = parse_as(Seal, parse_json(text), path)
    if not found.files:
        raise UserError(f"{path} lists no files")
    if found.text() != text or found.sha256 not in (None, found.digest()) or not _has_all_hashes(found):
        raise UserError(f"{path} was changed after it was written")
    if found.sha256 is None:
        logger.info("%s is the seal of an earlier scmdm and has no hash of its own", path)
    return found


def _has_all_hashes(found: Seal) -> bool:
    """Return whether every file with chunks has as many hashes as chunks; their size must be usable."""
    chunked = [file for file in found.files.values() if not isinstance(file.sha256, str)]
    if found.chunk_bytes is None or found.chunk_bytes < 1:
        return not chunked
    return all(1 < len(file.sha256) == -(-file.bytes // found.chunk_bytes) for file in chunked)


def sha256_of_model(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's or export's seal, which identifies the model."""
    return sha256_file(path / SEAL)


def _check_size(directory: Path, name: str, expected: FileHash) -> str | None:
    path = name_inside(directory, name, directory / SEAL)
    if not os.path.lexists(path):
        return f"{path} is missing"
    size = require_regular(path).st_size
    if size != expected.bytes:
        return f"{path} has {size} bytes instead of {expected.bytes}"
    return None if os.access(path, os.R_OK) else f"{path} cannot be read"


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"


def _names(directory: Path) -> Iterator[str]:
    """Yield the names of everything below a directory but its folders; links to folders are not followed."""
    for folder, folders, files in os.walk(directory, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *links]:
            yield str(Path(folder, name).relative_to(directory))


def _raise(error: OSError) -> NoReturn:
    raise error
