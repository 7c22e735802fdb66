"""Files of a corpus: formats by suffix, the choice of files in a folder, and splits in their paths.

All sources that read the user's files find them with `find_files`, so that suffixes, hidden files and names of splits
mean the same everywhere.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from scmdm.config.fields import key
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, cut_into_parts
from scmdm.errors import UserError
from scmdm.system.untrusted import describe, require_regular

# Formats by suffix. Suffixes are compared in lower case, and any format may be compressed.
SUFFIXES: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".raw": "wikitext",
    ".tokens": "wikitext",
    ".smi": "smi",
    ".smiles": "smi",
    ".csv": "csv",
    ".tsv": "tsv",
    ".fa": "fasta",
    ".fasta": "fasta",
    ".fna": "fasta of nucleotides",
    ".ffn": "fasta of nucleotides",
    ".faa": "fasta of amino acids",
    ".fas": "fasta",
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".npy": "npy",
}
COMPRESSIONS: Mapping[str, str] = {
    ".gz": "gzip",
    ".bgz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
}
_UNCOMPRESSED = frozenset({"parquet", "png", "jpeg", "npy"})  # compressed inside, or mapped into memory
_CLUTTER = frozenset(  # of archives, file managers and file systems
    {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
)
_SHOWN = 3  # names in a message

_SPLIT_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "heldout"), "test"),
}
SPLIT_ORDER = (None, "validation", "test")  # None: the training set


@dataclass(frozen=True)
class FileKind:
    """Format and compression of a file, by its name."""

    suffix: str  # in lower case, without that of the compression; empty: none
    format: str | None  # a value of `SUFFIXES`; None: the suffix is not known
    compression: str | None = None  # a value of `COMPRESSIONS`
    stem: str = ""  # name without suffixes


def kind_of(name: str) -> FileKind:
    """Return the kind of a file by its name, ignoring case."""
    path = PurePosixPath(name)
    compression = COMPRESSIONS.get(path.suffix.lower())
    inner = PurePosixPath(path.stem) if compression else path
    suffix = inner.suffix.lower()
    return FileKind(suffix, SUFFIXES.get(suffix), compression, inner.stem)


def suffixes_of(formats: Iterable[str]) -> str:
    """List the suffixes of formats for a message, as in `.txt, .jsonl (also .gz, .zst)`."""
    wanted = set(formats)
    names = ", ".join(suffix for suffix, found in SUFFIXES.items() if found in wanted)
    return names if wanted <= _UNCOMPRESSED else f"{names} (also {', '.join(COMPRESSIONS)})"


def require_kind(path: Path, formats: Sequence[str], remedy: str = "") -> FileKind:
    """Return the kind of a file by its name. Raises UserError, which lists the known suffixes, for another format."""
    kind = kind_of(path.name)
    if not _is_readable(kind, formats):
        found = f"the suffix {''.join(path.suffixes[-2:])!r}" if path.suffix else "no suffix"
        raise UserError(
            f"{path} has {found}, which is not read here; the suffix must be one of {suffixes_of(formats)}"
            f"{remedy and f'; {remedy}'}"
        )
    return kind


def _is_readable(kind: FileKind, formats: Iterable[str]) -> bool:
    return kind.format in set(formats) and not (kind.compression and kind.format in _UNCOMPRESSED)


@dataclass(frozen=True)
class FoundFiles:
    """Files of a corpus in reading order, and the names that were skipped, by reason."""

    files: dict[str, Path]  # by path below the folder, with `/`
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def describe_skipped(self) -> str:
        """List what was skipped, as in `hidden 2 (.a, .b)`."""
        return ", ".join(f"{reason} {len(names):,} ({_some(names)})" for reason, names in self.skipped.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def find_files(
    path: Path,
    formats: Sequence[str],
    *,
    by_name: Sequence[str] = (),
    accepts: Callable[[str], bool] | None = None,
    any_suffix: bool = False,
    remedy: str = "",
) -> FoundFiles:
    """Find the files of a corpus: `path` itself, or all files below it whose suffix is one of `formats`, sorted.

    Skipped, and counted by reason: hidden files and folders, folders that are links (which might lead anywhere or in a
    circle), what is neither a file nor a folder, and other suffixes or names. `path` itself may also have one of the
    formats `by_name` or, with `any_suffix`, any name. `accepts` replaces the choice by suffix in a folder; it is called
    with the path below the folder.

    Raises UserError when there is no file, and when `path` itself has another suffix.
    """
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        if not is_folder:
            require_regular(path)
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {describe(error)}"
        raise UserError(
            f"source.path={path} {reason}; give a file or a folder of {suffixes_of([*formats, *by_name])}"
        ) from error
    if not is_folder:
        if not any_suffix:
            require_kind(path, [*formats, *by_name], remedy)
        return FoundFiles({path.name: path})
    files: dict[str, Path] = {}
    skipped: dict[str, list[str]] = {}
    for name, found_reason in sorted(_walk(path), key=lambda entry: PurePosixPath(entry[0]).parts):
        wanted = accepts(name) if accepts is not None else _is_readable(kind_of(name), formats)
        if found_reason is None and wanted:
            files[name] = path / name
        else:
            other = "other suffix" if accepts is None else "other name"
            skipped.setdefault(found_reason or other, []).append(name)
    found = FoundFiles(files, skipped)
    if not files:
        rest = f" (skipped: {found.describe_skipped()})" if skipped else ""
        raise UserError(
            f"source.path={path} holds no {suffixes_of(formats)} file{rest}; {remedy or 'give a folder that does'}"
        )
    return found


def _walk(root: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the path below `root` of each file, or of what is skipped, with the reason or None."""
    folders = [""]
    while folders:
        prefix = folders.pop()
        try:
            with os.scandir(root / prefix) as entries:
                found = list(entries)
        except OSError as error:
            raise UserError(f"the folder {root / prefix} cannot be read: {describe(error)}") from error
        for entry in found:
            reason = _reason_to_skip(entry)
            if reason is None and entry.is_dir(follow_symlinks=False):
                folders.append(f"{prefix}{entry.name}/")
            else:
                # Undecodable bytes of names would be lone surrogates, which no manifest can hold.
                shown = os.fsencode(f"{prefix}{entry.name}").decode(errors="replace")
                yield (shown if reason else f"{prefix}{entry.name}"), reason


def _reason_to_skip(entry: os.DirEntry[str]) -> str | None:
    if entry.name.startswith(".") or entry.name.lower() in _CLUTTER:
        return "hidden"
    if any(ord(letter) < 32 or ord(letter) == 127 or "\ud800" <= letter <= "\udfff" for letter in entry.name):
        return "unprintable name"
    if entry.is_dir(follow_symlinks=False):
        return None
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "broken link"
    if stat.S_ISDIR(mode):
        return "link to a folder"
    return None if stat.S_ISREG(mode) else "not a regular file"


@dataclass
class NamedSplitsConfig(SourceConfig):
    """Key of the sources whose files have names: how records are assigned to splits."""

    split_by: str = key(
        "auto",
        formerly=("splits",),
        help="splits by the names of files and folders (train, validation, valid, val, dev, test), or by hashes and "
        "fractions; auto: by names if each file's path names a split and they name more than one",
        choices=("auto", "names", "hash"),
    )

    @property
    def splits_by_name(self) -> bool:
        return self.split_by == "names"


def split_of_name(name: str) -> str | None:
    """Return the split named in a file's path, as in `wiki.valid.raw`; None for training or no name."""
    found = named_split(name)
    return None if found == "train" else found


def named_split(name: str) -> str | None:
    """Return the split in a path: of a whole folder or file name, else of a word in one, outermost first."""
    whole = _whole_split(name)
    if whole is not None:
        return whole
    words = (word for part in name.lower().split("/") for word in re.split(r"[^a-z]+", part))
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _whole_split(name: str) -> str | None:
    """Return the split that is the whole name of a folder in a path, or of its file without suffixes."""
    *folders, file = name.lower().split("/")
    return next((_SPLIT_WORDS[part] for part in [*folders, kind_of(file).stem] if part in _SPLIT_WORDS), None)


def without_split(name: str) -> str:
    """Remove the outermost folder that is named like a split from a path, as in `train/cat/1.png`."""
    *folders, file = name.split("/")
    at = next((at for at, folder in enumerate(folders) if folder.lower() in _SPLIT_WORDS), len(folders))
    return "/".join([*folders[:at], *folders[at + 1 :], file])


def split_by_name(names: Iterable[str], split_by: str) -> dict[str, str | None]:
    """Return the split of each file: `validation`, `test`, or None for training (where hashes decide).

    `split_by` is that of `NamedSplitsConfig`. Raises UserError with `auto` if the whole names of folders or files name
    several splits, but other files name none: hashes would mix the published splits.
    """
    found = {name: named_split(name) for name in names}
    named = set(found.values())
    if split_by == "auto" and None in named and len({_whole_split(name) for name in found} - {None}) > 1:
        others = [name for name, split in found.items() if split is None]
        raise UserError(
            f"source.split_by=auto: files are in splits by their names, but {len(others):,} are not ({_some(others)}); "
            "move those away, or set source.split_by=names to train on them, or source.split_by=hash"
        )
    if split_by == "hash" or (split_by == "auto" and (None in named or len(named) < 2)):
        return dict.fromkeys(found)
    return {name: None if split == "train" else split for name, split in found.items()}


def published_splits(splits: Mapping[str, str | None]) -> tuple[str, ...]:
    """Return the splits that `split_by_name` found, for `Source.published`."""
    return tuple(split for split in SPLIT_ORDER if split is not None and split in splits.values())


class NamedFiles(ABC):
    """Mixin for sources of files: their names give the splits, and no part has files of two splits.

    `_split_by` is that of `NamedSplitsConfig`.
    """

    _split_by: str

    @abstractmethod
    def _find(self) -> FoundFiles:
        """Find the files. Raises UserError when there are none."""

    def _cut(self, files: dict[str, Path], split: str | None, part_bytes: int) -> list[Part]:
        """Cut the files of a split into parts; here into groups of whole files."""
        return cut_into_parts(files, part_bytes, split=split)

    @cached_property
    def _found(self) -> FoundFiles:
        return self._find()

    @cached_property
    def _splits(self) -> dict[str, str | None]:
        return split_by_name(self._found.files, self._split_by)

    @property
    def published(self) -> tuple[str, ...]:
        """Splits in the names of the files."""
        return published_splits(self._splits)

    @property
    def skipped(self) -> Mapping[str, Sequence[str]]:
        """Names in the folder that are not read, by reason."""
        return self._found.skipped

    def files(self) -> dict[str, Path]:
        """Files by path below the folder. Raises UserError when there are none."""
        return self._found.files

    def parts(self, part_bytes: int) -> list[Part]:
        """Parts of the training files, then those of validation and test."""
        parts: list[Part] = []
        for split in SPLIT_ORDER:
            own = {name: path for name, path in self._found.files.items() if self._splits[name] == split}
            parts += self._cut(own, split, part_bytes) if own else []
        return parts
