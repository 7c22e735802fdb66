"""Files of shards that samples are read from: fetched into caches, and decompressed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from scmdm.data.manifest import FileInfo, Manifest, remote_of
from scmdm.data.remote import fetch, fetch_to, lock_directory
from scmdm.data.shard_compression import UNFINISHED, decompress_file, is_decompressed
from scmdm.data.shard_index import COMPRESSED_SUFFIX, ShardInfo, read_index
from scmdm.system.files import sha256_file


def is_ready(root: Path, split: str, shard: ShardInfo) -> bool:
    """Return whether samples of a shard can be read without fetching or decompressing it."""
    path = root / split / shard.raw_data.basename
    return path.is_file() if shard.zip_data is None else is_decompressed(path, shard)


def prepare_shard(root: Path, split: str, shard: ShardInfo, origin: str | None, file: FileInfo) -> int:
    """Fetch and decompress a shard unless that has been done, and return the bytes added to the directory.

    `file` is its file in the manifest. A cache keeps the decompressed file alone. Raises UserError when the shard
    cannot be fetched or is damaged.
    """
    if shard.zip_data is None:
        return fetch(root, origin, file) if origin is not None else 0
    if is_ready(root, split, shard):
        return 0
    path, stored = root / split / shard.raw_data.basename, root / file.file
    if origin is None or (stored.is_file() and sha256_file(stored) == file.sha256):
        decompress_file(stored, shard, path, str(stored))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as temporary:
            fetched = Path(temporary) / stored.name
            fetch_to(fetched, origin, file)
            decompress_file(fetched, shard, path, f"{origin}/{file.file}")
    return shard.raw_data.bytes


def prepare_shards(root: Path, split: str, shards: Sequence[ShardInfo]) -> None:
    """Fetch and decompress those of some shards of a split that samples cannot be read from yet.

    The directory is locked, so that of the processes of a machine one does it. A missing file of a data set that is
    neither compressed nor a cache is left to the reader to find.
    """
    origin = remote_of(root)
    missing = [s for s in shards if (origin or s.zip_data) and not is_ready(root, split, s)]
    if not missing:
        return
    files = {file.file: file for file in Manifest.read(root).split(split, root).files}
    with lock_directory(root):
        for shard in missing:
            prepare_shard(root, split, shard, origin, files[f"{split}/{shard.stored.basename}"])


def disk_needs(root: Path, manifest: Manifest) -> tuple[int, int]:
    """Return the bytes that the largest shard needs while it is made ready, and those of all that are not ready.

    A compressed shard needs both of its files meanwhile; the bytes of all shards are those decompressed.
    """
    files = [file for split in manifest.splits.values() for file in split.files]
    if remote_of(root) is None and not any(file.file.endswith(COMPRESSED_SUFFIX) for file in files):
        return 0, 0
    shards = [
        shard
        for split in manifest.splits
        for shard in read_index(root, split, manifest).shards
        if not is_ready(root, split, shard)
    ]
    largest = max((s.raw_data.bytes + (s.zip_data.bytes if s.zip_data else 0) for s in shards), default=0)
    return largest, sum(shard.raw_data.bytes for shard in shards)
