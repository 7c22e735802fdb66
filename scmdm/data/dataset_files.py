"""Checks of the files of a data set against its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from scmdm.data.manifest import INDEX_FILE, MANIFEST_FILE, FileInfo, Manifest, remedy_for, remote_of
from scmdm.data.shard_compression import is_decompressed
from scmdm.data.shard_index import SHARD_HASH, ShardInfo, read_index
from scmdm.data.tokenizers import load_tokenizer
from scmdm.errors import UserError
from scmdm.system.files import sha256_file
from scmdm.system.untrusted import LARGEST_TEXT, describe, require_regular


def file_problems(root: Path, *, hashes: bool) -> list[str]:
    """List missing and damaged files of a data set; a cache may lack some.

    Without `hashes`, shards are checked by size alone; indexes and the tokenizer are always hashed.
    """
    manifest, cached = Manifest.read(root), remote_of(root) is not None
    problems = [
        problem
        for split in manifest.splits.values()
        for file in split.files
        if (problem := _file_problem(root, file, hashes, cached)) is not None
    ]
    problems += _tokenizer_problems(root, manifest)
    if not problems:
        problems += [problem for name in manifest.splits for problem in _index_problems(root, name, manifest, hashes)]
    return problems


def check_dataset(root: Path) -> Manifest:
    """Check existence and sizes of the files, and return the manifest. Raises UserError for the first problem.

    In a cache, files of another size are removed and fetched again later.
    """
    if remote_of(root) is not None:
        _remove_damaged(root)
    problems = file_problems(root, hashes=False)
    if problems:
        raise UserError(f"{problems[0]}; {remedy_for(root)}")
    return Manifest.read(root)


def _remove_damaged(root: Path) -> None:
    for split in Manifest.read(root).splits.values():
        for file in split.files:
            path = root / file.file
            with suppress(FileNotFoundError):  # another rank may remove it at any time
                if path.is_file() and path.stat().st_size != file.bytes:
                    path.unlink()


def _file_problem(root: Path, file: FileInfo, hashes: bool, cached: bool) -> str | None:
    path = root / file.file
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            return f"{path} is a link that leads out of {root}"
        status = require_regular(path)
        if status.st_size != file.bytes:
            return f"{path} has {status.st_size} bytes instead of {file.bytes}"
        if (hashes or file.file.endswith(f"/{INDEX_FILE}")) and sha256_file(path) != file.sha256:
            return f"{path} does not match its SHA-256"
    except FileNotFoundError:
        return None if cached else f"{path} is missing"
    except (OSError, RuntimeError) as error:
        return f"{path} cannot be read: {describe(error)}"
    return None


def _tokenizer_problems(root: Path, manifest: Manifest) -> Iterator[str]:
    path = root / manifest.tokenizer.file
    try:
        if (size := require_regular(path).st_size) > LARGEST_TEXT:
            yield f"tokenizer {path} has {size} bytes; at most {LARGEST_TEXT} are read of such a file"
            return
        digest = sha256_file(path)
    except FileNotFoundError:
        yield f"tokenizer {path} is missing"
        return
    except OSError as error:
        yield f"tokenizer {path} cannot be read: {describe(error)}"
        return
    if digest != manifest.tokenizer.sha256:
        yield f"tokenizer {path} does not match its SHA-256 in {MANIFEST_FILE}"
        return
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        yield str(error)
        return
    if tokenizer.kind != manifest.tokenizer.kind:
        yield f"tokenizer {path} is of kind {tokenizer.kind}, but {MANIFEST_FILE} gives {manifest.tokenizer.kind}"
    for name in ("vocab_size", "mask_id", "pad_id", "bos_id", "eos_id"):
        ours, theirs = getattr(manifest, name), getattr(tokenizer, name)
        if ours != theirs:
            yield f"tokenizer {path} has {name}={theirs}, but {MANIFEST_FILE} gives {ours}"


def _index_problems(root: Path, split: str, manifest: Manifest, hashes: bool) -> Iterator[str]:
    try:
        index = read_index(root, split, manifest, remedy="")
    except UserError as error:
        yield str(error)
        return
    for shard in index.shards if hashes else ():
        path = root / split / shard.raw_data.basename
        if shard.zip_data is not None and os.path.lexists(path) and not _is_decompressed_shard(path, shard):
            yield f"{path} is not what {shard.zip_data.basename} decompresses to; remove it, and it is made again"


def _is_decompressed_shard(path: Path, shard: ShardInfo) -> bool:
    if not is_decompressed(path, shard):
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, SHARD_HASH).hexdigest() == shard.raw_data.hashes[SHARD_HASH]
