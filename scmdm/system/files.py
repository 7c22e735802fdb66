"""Atomic writes: a file or directory is complete or absent, also after a crash."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scmdm.errors import UserError
from scmdm.system.hashing import hash_range
from scmdm.system.run_directory import RESERVED_FILES


def fsync_path(path: Path) -> None:
    """Flush a file's or a directory's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    return hash_range(path, 0, sys.maxsize)


def cannot_write(path: Path, error: OSError) -> UserError:
    """Make the error for a file or directory that the system does not let us write."""
    return UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another place")


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers, also after a crash, see either the old or the new content.

    Raises UserError if the directory cannot be written or the disk is full; `path` is then unchanged.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise cannot_write(path, error) from error


def require_writable(path: Path) -> None:
    """Create the parent directory of an output. Raises UserError unless files can be created in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UserError(
            f"out={path} cannot be written ({error.strerror or error}); choose another place, or free space"
        ) from error


def require_output_file(path: Path, suffix: str = "") -> None:
    """Create the parent directory of an output file.

    Raises UserError unless files can be created in it, and if `path` is a directory, has a reserved name, or has not
    the suffix that is given.
    """
    if path.is_dir() or path.name in RESERVED_FILES or not path.name.endswith(suffix):
        found = "a directory" if path.is_dir() else f"named {path.name}"
        raise UserError(
            f"out={path} is {found}, which is not possible; give a file{suffix and f' *{suffix}'}, whose name is none "
            f"of {', '.join(sorted(RESERVED_FILES))}"
        )
    require_writable(path)


def json_text(content: Any, indent: int | None = None) -> str:
    """Return content as a line or text of JSON, with null for numbers that are not finite, which JSON does not have."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def atomic_write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())


def remove_tree(path: Path) -> None:
    """Remove a file, a link (but not what it points to) or a directory, if it exists. Raises OSError otherwise."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def atomic_directory(final: Path, *, replace: bool = False, flushed: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `final` if the block succeeds and removed if it raises.

    `final` must not exist, unless `replace` is set. All files are flushed to the disk before the rename, so that
    `final` is complete or absent after a power failure; with `flushed` the block has done so for everything in the
    directory. An OSError in the block, such as a full disk, becomes a UserError that names `final`.
    """
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
        temporary.chmod(0o755)
        yield temporary
        for path in () if flushed else sorted(temporary.rglob("*"), reverse=True):
            fsync_path(path)
        fsync_path(temporary)
        if replace and (final.is_symlink() or final.is_file()):
            final.unlink()
            os.rename(temporary, final)
        elif replace and final.exists():
            # A crash between the two renames leaves both directories, the old one under a hidden name.
            replaced = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
            os.rename(final, replaced)
            os.rename(temporary, final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(temporary, final)
        fsync_path(final.parent)
    except OSError as error:
        raise cannot_write(final, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
