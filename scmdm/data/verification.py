"""Verification of every byte of a prepared data set: `scmdm prepare --verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from scmdm.data.dataset_files import file_problems
from scmdm.data.manifest import INDEX_FILE, MANIFEST_FILE, Manifest, remote_of
from scmdm.data.shard_compression import decompressed
from scmdm.data.shard_files import is_ready
from scmdm.data.shard_index import COMPRESSED_SUFFIX, ShardInfo, find_wrong_value, read_index
from scmdm.data.shard_reader import ShardReader
from scmdm.errors import UserError
from scmdm.system.untrusted import reading


def verify_dataset(root: Path) -> list[str]:
    """List the problems of a data set, each with its file. Checks the hashes of all files, then the ids in the shards.

    A cache of a remote data set may lack files; ids are checked only in complete splits.
    """
    problems = [*file_problems(root, hashes=True), *_unlisted(root)]
    if problems:
        return problems
    manifest = Manifest.read(root)
    return [problem for name in manifest.splits for problem in _verify_values(root, name, manifest)]


def _unlisted(root: Path) -> Iterator[str]:
    """Yield a problem for everything in the directories of the splits that the manifest does not list.

    Hidden names are left out: in a cache they are unfinished downloads.
    """
    for split, info in Manifest.read(root).splits.items():
        listed = {file.file for file in info.files}
        listed |= {name.removesuffix(COMPRESSED_SUFFIX) for name in listed}  # decompressed shards
        for path in sorted((root / split).glob("[!.]*")):
            if f"{split}/{path.name}" not in listed:
                yield f"{path} is not listed in {MANIFEST_FILE}"


def _verify_values(root: Path, split: str, manifest: Manifest) -> Iterator[str]:
    if remote_of(root) is not None and not (root / split / INDEX_FILE).is_file():
        return
    shards, first = read_index(root, split, manifest).shards, 0
    if remote_of(root) is not None and not all(is_ready(root, split, shard) for shard in shards):
        return
    for shard in shards:
        path = root / split / shard.raw_data.basename
        try:
            content = _decompressed_content(root, split, shard)
            with reading(path, "shard"):
                columns = ShardReader(root, split, shard).read_all(content)
        except UserError as error:
            yield str(error)
            return
        wrong = find_wrong_value(columns, manifest, len(manifest.labels))
        if wrong is not None:
            yield f"{path}: sample {first + wrong.row} of {split}: {wrong.reason}"
            return
        first += shard.samples


def _decompressed_content(root: Path, split: str, shard: ShardInfo) -> bytes | None:
    """Return the content of a compressed file, if there is one: verification adds no files to a data set."""
    path = root / split / shard.stored.basename
    if shard.zip_data is None or not path.is_file():
        return None
    return b"".join(decompressed(path, shard, str(path), remedy=""))
