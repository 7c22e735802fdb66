"""Local directories as caches of data sets in an object store; upload of data sets.

`remote.json` in the directory names the remote data set. The cache first receives the manifest, the tokenizer and
the indexes of the shards; shards are added when they are needed. Every file is written under a temporary name and
renamed when its SHA-256 matches the manifest, so that a file in the cache was whole when it was fetched.

Files are transferred by streaming, which supports S3, Google, Azure, local directories and others, with its environment
variables, such as S3_ENDPOINT_URL.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

from filelock import FileLock

from scmdm.data.manifest import INDEX_FILE, MANIFEST_FILE, REMOTE_FILE, FileInfo, Manifest, mark_as_cache, remote_of
from scmdm.data.mosaic_streaming import CloudDownloader, CloudUploader
from scmdm.data.shard_compression import UNFINISHED
from scmdm.errors import UserError
from scmdm.system.files import sha256_file
from scmdm.system.untrusted import LARGEST_TEXT

LOCK_FILE = ".fetch.lock"  # in a cache, and in a data set with compressed shards that were read
_TIMEOUT_S = 60.0
_WATCH_S = 0.05  # time between two looks at the size of what is downloaded
_MANIFEST = ".manifest."  # as UNFINISHED, of the directory of a manifest
_ABANDONED_S = 24 * 3600  # age of the remains of a killed download


def open_cache(root: Path, remote: str, key: str) -> None:
    """Make `root` the cache of `remote`, or check that it is: fetch the manifest, the tokenizer and the indexes.

    Raises UserError when a file cannot be fetched, or when `root` is a data set or another one's cache. `key` is the
    configuration key of `root`, for the message.
    """
    remote = remote.rstrip("/")
    # The mark precedes the manifest, so that a directory with a manifest alone is no cache that is being made.
    if (root / MANIFEST_FILE).exists() and not os.path.lexists(root / REMOTE_FILE):
        raise UserError(
            f"{key}={root} is a data set, not a cache, from which files may be removed; leave data.remote out, or give "
            f"another directory for the cache of {remote}"
        )
    with lock_directory(root), tempfile.TemporaryDirectory(prefix=_MANIFEST, dir=root) as temporary:
        download(remote, MANIFEST_FILE, Path(temporary) / MANIFEST_FILE, LARGEST_TEXT)
        manifest = Manifest.read(Path(temporary))
        if (root / MANIFEST_FILE).exists() and Manifest.read(root).fingerprint() != manifest.fingerprint():
            raise UserError(
                f"{key}={root} holds a different data set from {remote}; give another cache directory, or remove it"
            )
        mark_as_cache(root, remote)
        for file in _small_files(manifest):
            _fetch_or_replace(root, remote, file)
        os.replace(Path(temporary) / MANIFEST_FILE, root / MANIFEST_FILE)
        remove_abandoned([root, *(root / name for name in manifest.splits)])


def fetch_index(root: Path, split: str) -> None:
    """Fetch the index of a split if it is missing and `root` is a cache."""
    remote, name = remote_of(root), f"{split}/{INDEX_FILE}"
    if remote is None or (root / name).is_file():
        return
    with lock_directory(root):
        for file in Manifest.read(root).split(split, root).files:
            if file.file == name:
                fetch(root, remote, file)


def fetch(root: Path, remote: str, file: FileInfo) -> int:
    """Fetch a file unless the cache has it, and return the number of bytes added to the cache.

    Raises UserError when it cannot be fetched, or does not match its hash in the manifest.
    """
    path = root / file.file
    if path.is_file():
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as temporary:
        found = Path(temporary) / path.name
        size = fetch_to(found, remote, file)
        os.replace(found, path)
    return size


def fetch_to(found: Path, remote: str, file: FileInfo) -> int:
    """Fetch a file to a path in a directory that has no other files, and return its size. Raises UserError."""
    download(remote, file.file, found, file.bytes)
    size, sha256 = found.stat().st_size, sha256_file(found)
    if sha256 != file.sha256:
        raise UserError(
            f"{remote}/{file.file} is damaged: {size} bytes with SHA-256 {sha256[:12]}..., but {MANIFEST_FILE} has "
            f"{file.sha256[:12]}...; upload it again"
        )
    return size


def download(remote: str, name: str, to: Path, limit: int) -> None:
    """Copy `remote/name`, of at most `limit` bytes, to a path in a directory that has no other files.

    Raises UserError with URL and reason.
    """
    try:
        transport = _transport(remote, os.environ.get("S3_ENDPOINT_URL"), os.getpid())
        _download_within(transport, f"{remote}/{name}", to, limit)
    except Exception as error:
        _transport.cache_clear()  # credentials may change
        raise UserError(
            f"cannot fetch {remote}/{name}: {_reason(error)}; check the URL, the credentials (AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID ...), S3_ENDPOINT_URL and the network"
        ) from error


class _TooLargeError(Exception):
    pass


def _download_within(transport: CloudDownloader, url: str, to: Path, limit: int) -> None:
    """Download in a thread, and end it when more than `limit` bytes have arrived.

    Streaming's clients have no limit, and a server may send forever whatever length it has announced.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            transport.download(url, str(to), _TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True, name=f"download of {url}")
    thread.start()
    while thread.is_alive():
        thread.join(_WATCH_S)
        if _size(to.parent) > limit:
            _end(thread)
            raise _TooLargeError(f"more than the {limit} bytes that it may have")
    if failures:
        raise failures[0]


def _size(folder: Path) -> int:
    """Return the size of the files of a folder: clients write under temporary names before they rename."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _end(thread: threading.Thread) -> None:
    """Raise an exception in a thread, at its next step. Python has no other way to end a thread of a library."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TooLargeError))
    thread.join(_TIMEOUT_S)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove what killed processes have left. Other runs may be downloading, so that only old remains are taken."""
    oldest = time.time() - _ABANDONED_S
    for folder in folders:
        for path in [*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"{_MANIFEST}*")]:
            if path.is_dir() and path.lstat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)


@lru_cache(maxsize=16)
def _transport(remote: str, _endpoint: str | None, _process: int) -> CloudDownloader:
    """Return the client of a remote, cached because it is slow to make. Only threads may share it, not processes."""
    return CloudDownloader.get(remote)


def upload_dataset(root: Path, remote: str) -> None:
    """Copy a data set to `remote`. The manifest is written last: once it exists, the data set is complete."""
    manifest = Manifest.read(root)
    shards = [file.file for split in manifest.splits.values() for file in split.files]
    # The uploader warns about a local directory that is not empty.
    logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)
    try:
        uploader = CloudUploader.get((str(root), remote.rstrip("/")), keep_local=True, exist_ok=True)
        for name in [*shards, manifest.tokenizer.file, MANIFEST_FILE]:
            uploader.upload_file(name)
    except Exception as error:
        raise UserError(
            f"upload={remote}: {_reason(error)}; check that the bucket exists, the credentials (AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID ...), S3_ENDPOINT_URL and the network"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _small_files(manifest: Manifest) -> Iterator[FileInfo]:
    """Yield tokenizer and indexes, which a run reads before any shard."""
    yield FileInfo(manifest.tokenizer.file, LARGEST_TEXT, manifest.tokenizer.sha256)  # the manifest has no size
    for split in manifest.splits.values():
        yield from (file for file in split.files if PurePosixPath(file.file).name == INDEX_FILE)


def _fetch_or_replace(root: Path, remote: str, file: FileInfo) -> None:
    """Fetch a small file unless the cache has it undamaged."""
    path = root / file.file
    if path.is_file() and sha256_file(path) != file.sha256:
        path.unlink()
    fetch(root, remote, file)


@contextmanager
def lock_directory(root: Path) -> Iterator[None]:
    """Lock a cache, or a data set with compressed shards, against other ranks and runs on the machine."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / LOCK_FILE):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write {root}: {error.strerror or error}; free space, or choose another directory as data.path, "
            "the cache of a data set in data.remote"
        ) from error
