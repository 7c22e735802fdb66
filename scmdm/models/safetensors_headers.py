"""Headers of safetensors files, checked before a tensor of the file is read or memory for it is allocated.

The library opens any header that is consistent with the file's size, of any number of names, and takes quadratic time
for many of them. Here a header is read once, with bounds, and every refusal names file and tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmdm.errors import UserError
from scmdm.system.untrusted import name_inside, parse_as, parse_json, read_json, reading, require_regular

SUFFIX = ".safetensors"
SINGLE_FILE, INDEX_FILE = f"model{SUFFIX}", f"model{SUFFIX}.index.json"
LARGEST_JSON = 2**26  # bytes of an index or a configuration
_WHAT, _REMEDY = "safetensors file", "download or restore it"
_LARGEST_HEADER = 2**24  # bytes, about 150,000 tensors
_METADATA = "__metadata__"
_MOST_DIMENSIONS = 8
_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
_BYTES = {
    **{name: dtype.itemsize for name, dtype in _FLOATING.items()},
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I64", "U64", "C64"), 8),
}


@dataclass(frozen=True)
class _Entry:
    """Description of a tensor in a header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its name in messages, dtype as the format spells it, and shape."""

    file: Path
    name: str
    dtype_name: str
    shape: torch.Size
    begin: int = 0  # of its bytes in the file; meaningless for a tensor that is made up of shards

    @property
    def end(self) -> int:
        """End of its bytes in the file."""
        return self.begin + math.prod(self.shape) * _BYTES[self.dtype_name]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype, which is floating-point. Raises UserError for any other: such numbers are not weights."""
        if self.dtype_name not in _FLOATING:
            raise UserError(
                f"{self.file}: {self.name} has dtype {self.dtype_name}; weights are {', '.join(_FLOATING)}: give a "
                "model that is not quantized"
            )
        return _FLOATING[self.dtype_name]


@dataclass(frozen=True)
class Header:
    """Content of a file's header."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str] = field(default_factory=dict)
    bytes: int = 0  # before the first tensor


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises UserError unless the file is regular, each name stands once, and the tensors fill the file exactly.
    """
    with reading(path, _WHAT, _REMEDY):
        size = require_regular(path).st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}; at most {_LARGEST_HEADER} are read")
            content = parse_json(file.read(length))
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a complete {_WHAT}: its header is not a JSON object; {_REMEDY}")
    metadata = parse_as(dict[str, str], content.pop(_METADATA, None) or {}, f"{path}, {_METADATA}")
    entries = parse_as(dict[str, _Entry], content, path)
    _check_places(path, entries, size - 8 - length)
    found = {
        name: StoredTensor(path, name, entry.dtype, torch.Size(entry.shape), 8 + length + entry.data_offsets[0])
        for name, entry in entries.items()
    }
    return Header(found, metadata, 8 + length)


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a safetensors file whose tensors follow in the order of `tensors`, without gaps.

    Tensors of larger elements must come first, so that each is aligned.
    """
    content: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        content[name] = asdict(_Entry(_dtype_name(tensor.dtype), list(tensor.shape), [begin, end]))
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dtype_name(dtype: torch.dtype) -> str:
    names = {known: name for name, known in (_FLOATING | _INTEGERS).items()}
    return names[dtype]


def _check_places(path: Path, entries: Mapping[str, _Entry], data: int) -> None:
    """Raise UserError unless the tensors fill `data` bytes without gaps, overlaps and overflows."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _BYTES:
            raise UserError(f"{path}: {name} has dtype {entry.dtype!r}; expected one of {', '.join(_BYTES)}")
        if len(entry.shape) > _MOST_DIMENSIONS or any(not 0 <= size < 2**48 for size in entry.shape):
            raise UserError(f"{path}: {name} has shape {entry.shape}, which no tensor has; {_REMEDY}")
        wanted = [end, end + math.prod(entry.shape) * _BYTES[entry.dtype]]
        if entry.data_offsets != wanted or wanted[1] > data:
            raise UserError(
                f"{path} is not a complete {_WHAT}: {name} of shape {entry.shape} is at bytes {entry.data_offsets} of "
                f"{data}, expected {wanted}; {_REMEDY}"
            )
        end = wanted[1]
    if end != data:
        raise UserError(f"{path} is not a complete {_WHAT}: {data} bytes of tensors, of which its header names {end}")


def merge_headers(headers: Iterable[Header]) -> dict[str, StoredTensor]:
    """Return the tensors of several files. Raises UserError, which names both files, for a duplicate name."""
    found: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in found:
                raise UserError(
                    f"{tensor.file.parent}: {name} is in {found[name].file.name} and in {tensor.file.name}; remove one "
                    "of the files"
                )
            found[name] = tensor
    return found


@dataclass(frozen=True)
class _Index:
    """Content of an index of weights files; the metadata is not used."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def published_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a directory with one file or an index, as on the Hugging Face hub.

    Raises UserError for a file outside the directory, and unless the index lists exactly the tensors of its files.
    """
    path = directory / INDEX_FILE
    try:
        content = read_json(path, limit=LARGEST_JSON, remedy=_REMEDY)
    except FileNotFoundError as error:
        if not (directory / SINGLE_FILE).is_file():
            raise UserError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a directory with the weights"
            ) from error
        return read_header(directory / SINGLE_FILE).tensors
    listed = parse_as(_Index, content, path, _REMEDY).weight_map
    if not listed:
        raise UserError(f"{path} has an empty weight_map; {_REMEDY}")
    files = {name: _named_file(directory, name) for name in sorted(set(listed.values()))}
    found = merge_headers(read_header(file) for file in files.values())
    for name, file_name in listed.items():
        if name not in found or found[name].file != files[file_name]:
            raise UserError(f"{path} says that {name} is in {file_name}, which does not have it; {_REMEDY}")
    for name, tensor in found.items():
        if name not in listed:
            raise UserError(f"{path} does not list {name}, which is in {tensor.file.name}; {_REMEDY}")
    return found


def _named_file(directory: Path, name: str) -> Path:
    """Return the weights file that the index calls `name`. Raises UserError for any other place or kind of file."""
    path = directory / INDEX_FILE
    if "/" in name or not name.endswith(SUFFIX):
        raise UserError(f"{path} names a file {name!r}, which is not a {SUFFIX} file of this directory; {_REMEDY}")
    if directory.parent.name == "snapshots":  # the hub's cache, whose files are links into the folder `blobs`
        name_inside(directory.parent.parent, f"snapshots/{directory.name}/{name}", path)
        return directory / name
    return name_inside(directory, name, path)


def require_finite(name: str, value: Tensor, origin: Path | str) -> None:
    """Raise UserError, which names the tensor, unless it is dense, floating-point and finite."""
    if value.layout != torch.strided or not value.is_floating_point() or value.dtype.itemsize < 2:
        raise UserError(
            f"{origin}: {name} is {value.dtype}, {value.layout}; weights are dense tensors of "
            f"{', '.join(str(dtype) for dtype in _FLOATING.values())}"
        )
    if value.numel() and not value.is_meta:
        low, high = torch.aminmax(value)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise UserError(f"{origin}: {name} holds NaN or infinite numbers; use other weights")


def require_finite_all(tensors: Iterable[tuple[str, Any]], origin: Path | str) -> None:
    """Check tensors, of a sharded one this rank's part, as `require_finite` does."""
    for name, value in tensors:
        local = value.to_local() if hasattr(value, "to_local") else value
        require_finite(name, local, origin)
