"""Index of the shards of a split, `SPLIT/index.json`, in the format of mosaicml-streaming, and the values of samples.

Legend: N samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from scmdm.data.manifest import INDEX_FILE, MANIFEST_FILE, Bytes, Count, Manifest, remedy_for
from scmdm.errors import UserError
from scmdm.system.untrusted import parse_as, parse_json, read_bytes, reading

COLUMN, LABEL = "tokens", "label"
DOCUMENTS = "documents"  # of packed samples: index of each token's document within the sample
GIVEN = "given"  # number of leading tokens that are never masked: [BOS] and the prompt
GIVEN_MASK = "given_mask"  # of conversations: 1 for each token that is never masked, outside of the answers
OPTIONAL_COLUMNS = (DOCUMENTS, GIVEN, GIVEN_MASK, LABEL)
_VERSION = Annotated[int, Field(ge=2, le=2)]  # of streaming's format
SHARD_SUFFIX, COMPRESSED_SUFFIX = ".mds", ".zstd"  # a compressed shard is NAME.mds.zstd
SHARD_HASH = "sha1"  # streaming's hash of a shard, as requested from its writer
_LARGEST_HEADER = 2**16  # bytes of a shard besides samples and offsets: the names and types of the columns


@dataclass(frozen=True)
class ShardFile:
    """File of a shard."""

    basename: str
    bytes: Bytes
    hashes: dict[str, str]


@dataclass(frozen=True)
class ShardInfo:
    """A shard."""

    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[int | None]
    compression: Annotated[str, Field(pattern=r"^zstd(:\d\d?)?$")] | None
    format: Annotated[str, Field(pattern="^mds$")]
    hashes: list[str]
    raw_data: ShardFile
    samples: Count
    size_limit: int | None
    version: _VERSION
    zip_data: ShardFile | None

    @property
    def stored(self) -> ShardFile:
        """The file of the data set: the compressed one, if there is one."""
        return self.zip_data or self.raw_data

    @property
    def columns(self) -> dict[str, str]:
        """Encodings by name."""
        return dict(zip(self.column_names, self.column_encodings, strict=True))


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a split, in order."""

    shards: list[ShardInfo]
    version: _VERSION


def columns_of(dtype: str, length: int, *, labels: bool, framing: str) -> dict[str, str]:
    """Return the encodings of the columns of a data set by name."""
    columns = {COLUMN: f"ndarray:{dtype}:{length}"}
    if labels:
        columns[LABEL] = "int32"
    if framing == "prompts":
        columns[GIVEN] = "int32"
    if framing == "chats":
        columns[GIVEN_MASK] = f"ndarray:uint8:{length}"
    if framing == "packed":
        columns[DOCUMENTS] = f"ndarray:uint16:{length}"
    return columns


def dtype_and_length(encoding: str) -> tuple[np.dtype, int]:
    """Return data type and length of an encoding such as `ndarray:uint16:32`; length 0 for a scalar such as `int32`."""
    kind, *rest = encoding.split(":")
    return (np.dtype(rest[0]), int(rest[1])) if kind == "ndarray" else (np.dtype(kind), 0)


def bytes_of_sample(columns: Mapping[str, str]) -> int:
    """Return the size of a sample with these columns."""
    return sum(dtype.itemsize * (length or 1) for dtype, length in map(dtype_and_length, columns.values()))


def parse_index(data: bytes, path: Path, remedy: str = "") -> ShardIndex:
    """Parse the content of an index. Raises UserError, which names `path`."""
    with reading(path, "index of shards", remedy):
        return parse_as(ShardIndex, parse_json(data), path, remedy)


def read_index(root: Path, split: str, manifest: Manifest, remedy: str | None = None) -> ShardIndex:
    """Read the index of a split. Raises UserError when it is damaged, or does not match the data set's manifest."""
    path = root / split / INDEX_FILE
    remedy = remedy_for(root) if remedy is None else remedy
    with reading(path, "index of shards", remedy):
        data = read_bytes(path)
    hashes = {file.file: file.sha256 for file in manifest.split(split, root).files}
    if hashlib.sha256(data).hexdigest() != hashes.get(f"{split}/{INDEX_FILE}"):
        raise UserError(f"{path} does not match its SHA-256 in {MANIFEST_FILE}{remedy and f'; {remedy}'}")
    index = parse_index(data, path, remedy)
    for problem in _mismatches(index, split, manifest):
        raise UserError(f"{path} {problem}{remedy and f'; {remedy}'}")
    return index


def _mismatches(index: ShardIndex, split: str, manifest: Manifest) -> Iterator[str]:
    """Yield what does not match the manifest."""
    info, name = manifest.splits[split], f"{split}/{INDEX_FILE}"
    samples = sum(shard.samples for shard in index.shards)
    if samples != info.samples:
        yield f"lists {samples} samples, but {MANIFEST_FILE} gives {info.samples}"
    expected = {file.file: file.bytes for file in info.files if file.file != name}
    listed = {f"{split}/{shard.stored.basename}": shard.stored.bytes for shard in index.shards}
    if listed != expected or len(listed) != len(index.shards):
        differing = sorted({key for key, _ in listed.items() ^ expected.items()})
        yield f"and {MANIFEST_FILE} list different shards or sizes: {', '.join(differing[:3]) or 'a duplicate'}"
    columns = columns_of(manifest.dtype, manifest.length, labels=bool(manifest.labels), framing=manifest.framing)
    sample = bytes_of_sample(columns)
    for shard in index.shards:
        if len(shard.column_names) != len(columns) or len(shard.column_encodings) != len(columns):
            yield f"gives {shard.raw_data.basename} {len(shard.column_names)} columns instead of {len(columns)}"
        elif shard.columns != columns:
            yield f"gives {shard.raw_data.basename} the columns {shard.columns}, but {MANIFEST_FILE} implies {columns}"
        elif shard.samples * (sample + 4) + 8 > shard.raw_data.bytes:  # a table of 4-byte offsets comes first
            yield f"gives {shard.raw_data.basename} {shard.samples} samples, more than it has room for"
        else:
            yield from _wrong_compression(shard, shard.samples * (sample + 4) + 8)
    if len({shard.raw_data.basename for shard in index.shards}) != len(index.shards):
        yield "gives two shards the same name"


def _wrong_compression(shard: ShardInfo, least: int) -> Iterator[str]:
    """Yield what cannot be true of a compressed shard, whose samples and their offsets have `least` bytes.

    Its decompressed file gets the name in the index: that name must be the compressed file's, without the suffix.
    """
    name, raw, compressed = shard.stored.basename, shard.raw_data, shard.zip_data
    if (shard.compression is None) != (compressed is None):
        yield f"gives {name} compression={shard.compression}, but {'no' if compressed is None else 'a'} compressed file"
    elif compressed is not None:
        if not raw.basename.endswith(SHARD_SUFFIX) or compressed.basename != raw.basename + COMPRESSED_SUFFIX:
            yield f"gives {name} the decompressed name {raw.basename!r:.100}, instead of {name} without its suffix"
        if raw.bytes > least + _LARGEST_HEADER:
            yield f"gives {name} {raw.bytes} decompressed bytes, more than its {shard.samples} samples take"
        if SHARD_HASH not in raw.hashes or SHARD_HASH not in compressed.hashes:
            yield f"gives {name} no {SHARD_HASH}"


@dataclass(frozen=True)
class WrongValue:
    """A value that no sample of a data set can have."""

    row: int
    reason: str


def find_wrong_value(columns: Mapping[str, np.ndarray], manifest: Manifest, labels: int) -> WrongValue | None:
    """Return the first wrong value of some samples, given as arrays over (N, ...) by column, or None.

    `labels` is the number of classes. Two or three passes over contiguous arrays, so that every batch can be checked.
    """
    limits = {COLUMN: manifest.vocab_size, LABEL: labels, GIVEN_MASK: 2}
    for name, values in columns.items():
        limit = limits.get(name, manifest.length + 1)
        if values.size and (values.max() >= limit or values.min() < 0):
            wrong_N = ((values < 0) | (values >= limit)).reshape(len(values), -1)
            row = int(wrong_N.any(1).argmax())
            value = values.reshape(len(values), -1)[row][wrong_N[row].argmax()]
            return WrongValue(row, f"{name} holds {value}, outside of 0 to {limit - 1}")
    tokens = columns.get(COLUMN)
    if tokens is not None and (masked_NL := tokens == manifest.mask_id).any():
        return WrongValue(int(masked_NL.any(1).argmax()), f"{COLUMN} holds the mask id {manifest.mask_id} as data")
    return None
