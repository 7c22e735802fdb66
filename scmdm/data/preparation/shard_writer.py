"""Write a data set: MDS shards of mosaicml-streaming and a manifest. A data set is complete or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scmdm.data.dataset_files import check_dataset
from scmdm.data.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    VERSION,
    FileInfo,
    Manifest,
    SplitInfo,
    TokenizerRef,
    padding_id,
    remote_of,
)
from scmdm.data.mosaic_streaming import MDSWriter
from scmdm.data.preparation.framing import FramedSequence
from scmdm.data.preparation.task_queue import read_result
from scmdm.data.remote import LOCK_FILE
from scmdm.data.shard_compression import UNFINISHED
from scmdm.data.shard_index import (
    COLUMN,
    COMPRESSED_SUFFIX,
    DOCUMENTS,
    GIVEN,
    GIVEN_MASK,
    LABEL,
    SHARD_HASH,
    SHARD_SUFFIX,
    ShardInfo,
    columns_of,
    parse_index,
)
from scmdm.data.tokenizers import Tokenizer
from scmdm.errors import UserError
from scmdm.system.files import atomic_directory, sha256_file
from scmdm.system.untrusted import read_bytes, reading, require_plain_name

_PIECE = "piece.json"


@dataclass(frozen=True)
class Description:
    """Content of the manifest besides the shards."""

    name: str
    length: int
    pad_policy: str
    bos_policy: str
    source: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    framing: str = "records"


# Files of a data set by their paths in it, with those that stopped processes have left.
_OWN_FILE = re.compile(
    rf"{re.escape(MANIFEST_FILE)}|{re.escape(LOCK_FILE)}|tokenizer\.\w+"
    rf"|[^/]+/({re.escape(INDEX_FILE)}|shard\.\d+{re.escape(SHARD_SUFFIX)}({re.escape(COMPRESSED_SUFFIX)})?)"
    rf"|[^/]+/{re.escape(UNFINISHED)}.*|(.*/)?\.[^/]+\.tmp"
)


def check_place(root: Path, overwrite: bool = False) -> None:
    """Raise UserError when `root` exists but is a cache or no data set; these are never replaced.

    With `overwrite`, also when it holds a file that is not of a data set, such as those of a run: all would be removed.
    The names decide, not the manifest, which may be damaged.
    """
    if not root.exists():
        return
    if not (root / MANIFEST_FILE).is_file():
        raise UserError(f"out={root} exists and is not a data set; choose another out, or remove it")
    if (remote := remote_of(root)) is not None:
        raise UserError(f"out={root} is a cache of {remote}; choose another out")
    for path in sorted(root.rglob("*")) if overwrite else ():
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and not _OWN_FILE.fullmatch(path.relative_to(root).as_posix()):
            raise UserError(
                f"out={root} with overwrite=true would remove {path}, which is not of the data set; move it away or "
                "choose another out"
            )


def is_up_to_date(root: Path, source: dict[str, Any], overwrite: bool) -> bool:
    """Return whether `root` already holds this data set, complete.

    Raises UserError as `check_place`, when a file is missing, and for another data set if `overwrite` is false.
    """
    check_place(root, overwrite)
    if overwrite or not root.exists():
        return False
    if Manifest.read(root).source == source:
        check_dataset(root)
        return True
    raise UserError(f"out={root} holds a data set made with other settings; choose another out, or set overwrite=true")


class SplitWriter:
    """Writer of the sequences of a split, or of a piece of one, into a directory of its own."""

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        description: Description,
        shard_bytes: int,
        compression: str | None = None,
    ) -> None:
        self._directory, self._tokenizer, self._description = directory, tokenizer, description
        self._dtype = _dtype(tokenizer)
        columns = columns_of(
            self._dtype, description.length, labels=bool(description.labels), framing=description.framing
        )
        self._writer = MDSWriter(
            out=str(directory), columns=columns, hashes=[SHARD_HASH], size_limit=shard_bytes, compression=compression
        )
        self._samples = self._tokens = 0

    def write(self, sequence: FramedSequence) -> None:
        """Pad a sequence and add it as a sample."""
        policy, length = self._description.pad_policy, self._description.length
        padding = padding_id(policy, pad_id=self._tokenizer.pad_id, eos_id=self._tokenizer.eos_id)
        ids_L = np.full(length, padding, self._dtype)
        ids_L[: len(sequence.ids)] = sequence.ids
        sample: dict[str, Any] = {COLUMN: ids_L}
        if self._description.labels:
            assert sequence.label is not None
            sample[LABEL] = np.int32(sequence.label)
        if sequence.given is not None:
            sample[GIVEN] = np.int32(sequence.given)
        if sequence.given_mask is not None:
            sample[GIVEN_MASK] = given_L = np.zeros(length, np.uint8)
            given_L[: len(sequence.given_mask)] = sequence.given_mask
        if sequence.documents is not None:
            sample[DOCUMENTS] = documents_L = np.full(length, sequence.documents[-1] + 1, np.uint16)
            documents_L[: len(sequence.documents)] = sequence.documents
        self._writer.write(sample)
        self._samples += 1
        self._tokens += len(sequence.ids) if policy in ("ignore", "masked") else length
        if sequence.given is not None:
            self._tokens -= sequence.given
        elif sequence.given_mask is not None:
            self._tokens -= sum(sequence.given_mask)
        elif self._description.bos_policy == "given":
            self._tokens -= 1 if sequence.documents is None else sequence.documents[-1] + 1

    def finish(self) -> SplitInfo:
        """Close the shards and hash them."""
        self._writer.finish()
        files = [_file_info(path, path.name) for path in sorted(self._directory.iterdir())]
        return SplitInfo(self._samples, self._tokens, files)


def write_piece(
    directory: Path,
    sequences: Iterable[tuple[str, FramedSequence]],
    tokenizer: Tokenizer,
    description: Description,
    shard_bytes: int,
    compression: str | None = None,
) -> None:
    """Write (split, sequence) pairs as shards in `directory`: a piece for `join_pieces`."""
    writers: dict[str, SplitWriter] = {}
    for split, sequence in sequences:
        if split not in writers:
            writers[split] = SplitWriter(directory / split, tokenizer, description, shard_bytes, compression)
        writers[split].write(sequence)
    content = {split: asdict(writer.finish()) for split, writer in writers.items()}
    (directory / _PIECE).write_text(json.dumps(content))


def join_pieces(
    root: Path,
    pieces: Sequence[Path],
    splits: Sequence[str],
    tokenizer: Tokenizer,
    description: Description,
    *,
    optional: Collection[str] = (),
    overwrite: bool = False,
    why_empty: Callable[[], str] = str,
    before_commit: Callable[[], None] = lambda: None,
) -> Manifest:
    """Join pieces that `write_piece` has written, in order, into the data set `root`.

    Files are linked, not moved; `root` is complete or absent, and gets its name after `before_commit` has returned.
    `optional` splits are left out when they are empty.
    Raises UserError for another empty split, with the reason that `why_empty` returns, and for a piece that has changed
    since it was written.
    """
    found = [_read_piece(piece) for piece in pieces]
    splits = [split for split in splits if split not in optional or any(split in infos for infos in found)]
    for split in splits:
        if not any(split in infos for infos in found):
            raise UserError(
                f"split {split} of {description.name} is empty{why_empty()}; give more data or a larger fraction"
            )
    with atomic_directory(root, replace=overwrite) as temporary:
        file = tokenizer.save(temporary)
        infos = {}
        for split in splits:
            parts = [(piece / split, info[split]) for piece, info in zip(pieces, found, strict=True) if split in info]
            infos[split] = _join_split(temporary / split, parts)
        manifest = make_manifest(tokenizer, file, infos, description)
        manifest.write(temporary)
        before_commit()
    return manifest


def write_dataset(
    root: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Sequence[Sequence[int]]],
    description: Description,
    *,
    shard_bytes: int,
    compression: str | None = None,
) -> Manifest:
    """Write sequences of ids by split as the data set `root`. Raises UserError for an empty split."""
    framed = ((name, FramedSequence(ids)) for name, sequences in splits.items() for ids in sequences)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as piece:
        write_piece(Path(piece), framed, tokenizer, description, shard_bytes, compression)
        return join_pieces(root, [Path(piece)], list(splits), tokenizer, description)


def _read_piece(piece: Path) -> dict[str, SplitInfo]:
    """Read what `write_piece` has written. Raises UserError when it is damaged."""
    path = piece / _PIECE
    found = read_result(path, dict[str, SplitInfo])
    for split, info in found.items():
        for name in (split, *(f"{split}/{file.file}" for file in info.files)):
            require_plain_name(name, piece, path)
    return found


def _remedy(piece: Path) -> str:
    return f"remove {piece.parent} and start again"


def _join_split(directory: Path, pieces: Sequence[tuple[Path, SplitInfo]]) -> SplitInfo:
    """Link the shards of all pieces under new numbers, and write one index."""
    directory.mkdir()
    shards: list[dict[str, Any]] = []
    files: list[FileInfo] = []
    for place, info in pieces:
        hashes = {file.file: file for file in info.files}
        for shard in _shards_of(place, hashes):
            old_name, shard = shard.stored.basename, _renamed(shard, f"shard.{len(shards):05}{SHARD_SUFFIX}")
            name = shard.stored.basename
            _link(place / old_name, directory / name)
            if (directory / name).stat().st_size != hashes[old_name].bytes:
                raise UserError(f"{place / old_name} has changed since it was written; {_remedy(place.parent)}")
            shards.append(asdict(shard))
            files.append(FileInfo(f"{directory.name}/{name}", hashes[old_name].bytes, hashes[old_name].sha256))
    # The format of streaming's writer.
    (directory / INDEX_FILE).write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    index = _file_info(directory / INDEX_FILE, f"{directory.name}/{INDEX_FILE}")
    samples, tokens = (sum(getattr(info, key) for _, info in pieces) for key in ("samples", "tokens"))
    return SplitInfo(samples, tokens, [index, *files])


def _renamed(shard: ShardInfo, name: str) -> ShardInfo:
    compressed = shard.zip_data and replace(shard.zip_data, basename=name + COMPRESSED_SUFFIX)
    return replace(shard, raw_data=replace(shard.raw_data, basename=name), zip_data=compressed)


def _shards_of(place: Path, files: Mapping[str, FileInfo]) -> list[ShardInfo]:
    """Read the index of a piece. Raises UserError when it is damaged, or lists other shards than the piece."""
    path, remedy = place / INDEX_FILE, _remedy(place.parent)
    with reading(path, "index of shards", remedy):
        shards = parse_index(read_bytes(path), path, remedy).shards
    for shard in shards:
        if shard.stored.basename not in files:
            raise UserError(f"{path} names a shard {shard.stored.basename!r:.100} that {_PIECE} does not; {remedy}")
    return shards


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _file_info(path: Path, name: str) -> FileInfo:
    return FileInfo(name, path.stat().st_size, sha256_file(path))


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def make_manifest(tokenizer: Tokenizer, file: Path, splits: dict[str, SplitInfo], description: Description) -> Manifest:
    """Make the manifest of a data set with these splits and this tokenizer, saved as `file`."""
    return Manifest(
        version=VERSION,
        name=description.name,
        tokenizer=TokenizerRef(tokenizer.kind, file.name, sha256_file(file)),
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        length=description.length,
        dtype=_dtype(tokenizer),
        pad_policy=description.pad_policy,
        bos_policy=description.bos_policy,
        splits=splits,
        source=description.source,
        counts=description.counts,
        labels=list(description.labels),
        framing=description.framing,
    )
