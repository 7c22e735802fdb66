"""Files of text by their suffix: what lies in them, document by document, in bounded memory.

A damaged file gives what is whole before the damage, and then says so.
"""

from __future__ import annotations

import importlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scmdm.data.records import Slice, cut_bytes, read_lines
from scmdm.errors import UserError

_UNPACKED = 1 << 20  # bytes unpacked at once
_PACKED = 1 << 16  # packed bytes read at once, each of which may unpack to hundreds
_GZIP = 16 + zlib.MAX_WBITS  # with gzip's own header
_ROWS = 256  # of a parquet file, decoded at once
_ZSTD_WINDOW = 1 << 31  # the largest that `zstd --long=31` writes
_DAMAGED = "damaged file"
_TITLE = re.compile(rb"\s*= [^=\n]+ =\s*")  # of an article; a section's heading has more signs on each side


@dataclass(frozen=True)
class Found:
    """One place of a file: its text, or why there is none."""

    where: str
    text: str | None
    problem: str = ""
    prompt: str | None = None  # what is given before the text


Cut = Callable[[str, Path, int], list[Slice]]


@dataclass(frozen=True)
class Format:
    """How a file is read, by slices that `cut` makes of a large one; `cut` None: it can only be read from its start.

    The keys (columns) are that of the text, or those of a prompt and of the text.
    """

    read: Callable[[Path, Slice, Sequence[str]], Iterator[Found]]
    cut: Cut | None
    whole_text: bool = False  # a slice of it is no document, only lines of one


def format_of(path: Path) -> Format:
    """By the end of the name; any other file is plain text."""
    return next((FORMATS[suffix] for suffix in FORMATS if path.name.endswith(suffix)), FORMATS[".txt"])


def optional(module: str, wanted_by: str) -> Any:
    """A module of a package that not everyone has; UserError says who wants it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{wanted_by} needs the package {package}; `pip install {package}`") from error


def _read_text(path: Path, piece: Slice, _keys: Sequence[str]) -> Iterator[Found]:
    where = f"{path} at byte {piece.start}"
    whole = _decoded(b"".join(line for _, line in read_lines(path, piece)), where)
    if whole.text is not None:
        yield whole
        return
    found = [_decoded(line, f"{path} at byte {at}") for at, line in read_lines(path, piece)]
    yield from (line for line in found if line.text is None)
    rest = "".join(line.text for line in found if line.text is not None)
    if rest.strip():
        yield Found(where, rest)


def _read_json_lines(path: Path, piece: Slice, keys: Sequence[str]) -> Iterator[Found]:
    for at, line in read_lines(path, piece):
        if line.strip():
            yield _from_json(line, keys, f"{path} at byte {at}")


def _read_articles(path: Path, piece: Slice, _keys: Sequence[str]) -> Iterator[Found]:
    """Articles whose title is in the slice, each to the next title; text before the first title is one by itself."""
    article: list[bytes] = []
    start = piece.start
    for at, line in read_lines(path, Slice(piece.file, piece.start)):
        title, outside = _TITLE.fullmatch(line) is not None, piece.end is not None and at >= piece.end
        if title:
            yield from _article(article, f"{path} at byte {start}")
            article, start = [], at
        if outside and not article:
            return
        if title or article or piece.start == 0:
            article.append(line)
    yield from _article(article, f"{path} at byte {start}")


def _article(lines: list[bytes], where: str) -> Iterator[Found]:
    text = b"".join(lines)
    if text.strip():
        yield _decoded(text, where)


def _decoded(raw: bytes, where: str) -> Found:
    try:
        return Found(where, raw.decode())
    except UnicodeDecodeError:
        return Found(where, None, "not UTF-8")


def _from_json(line: bytes, keys: Sequence[str], where: str) -> Found:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return Found(where, None, "not UTF-8")
    except (json.JSONDecodeError, RecursionError):
        return Found(where, None, f"no key {keys[-1]}")
    return of_row(row, keys, where)


def of_row(row: Any, keys: Sequence[str], where: str) -> Found:
    """The text of a row, with the prompt before it if there are two keys."""
    values = [row.get(key) if isinstance(row, dict) else None for key in keys]
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, str):
            return Found(where, None, f"no key {key}")
        if not _is_unicode(value):
            return Found(where, None, "not UTF-8")
    return Found(where, values[-1], prompt=values[0] if len(keys) == 2 else None)


def _is_unicode(text: str) -> bool:
    """JSON may spell half of a pair of surrogates, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _packed_json_lines(unpack: Callable[[IO[bytes]], Iterator[bytes]]) -> Callable[..., Iterator[Found]]:
    """A reader of JSON lines out of what `unpack` makes of a file's bytes; it raises EOFError or OSError for damage."""

    def read(path: Path, _piece: Slice, keys: Sequence[str]) -> Iterator[Found]:
        number, rest = 0, b""
        try:
            with open(path, "rb") as file:
                for chunk in unpack(file):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for number, line in enumerate(lines, number + 1):  # noqa: B020 (goes on counting)
                        if line.strip():
                            yield _from_json(line, keys, f"{path}, line {number}")
        except (EOFError, OSError, zlib.error) as error:
            yield Found(f"{path} behind line {number} ({' '.join(str(error).split())})", None, _DAMAGED)
            return
        if rest.strip():
            yield _from_json(rest, keys, f"{path}, line {number + 1}")

    return read


def _gunzipped(file: IO[bytes]) -> Iterator[bytes]:
    """Member by member: `gzip` gives nothing of the read in which it meets the damage."""
    member, inside = zlib.decompressobj(_GZIP), False
    while packed := file.read(_PACKED):
        # Zeros may stand behind a member, up to the end of a tape's block.
        while packed := packed if inside else packed.lstrip(b"\0"):
            yield member.decompress(packed, _UNPACKED)
            packed, inside = (member.unused_data, False) if member.eof else (member.unconsumed_tail, True)
            if not inside:
                member = zlib.decompressobj(_GZIP)
    if inside:
        yield member.flush()
        if not member.eof:
            raise EOFError("the last member is cut off")


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader takes the end of the file for the end of a frame that was cut."""
    zstandard = optional("zstandard", f"{getattr(file, 'name', 'a .zst file')}")
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, inside = unpacker.decompressobj(), False
    while packed := file.read(_PACKED):
        while packed:
            inside = True
            try:
                yield frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            packed = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, inside = unpacker.decompressobj(), False
    if inside:
        raise EOFError("the last frame is cut off")


def _read_parquet(path: Path, piece: Slice, keys: Sequence[str]) -> Iterator[Found]:
    """Row groups, some rows at a time: one that is large is never in memory as a whole."""
    parquet, arrow = (optional(module, str(path)) for module in ("pyarrow.parquet", "pyarrow"))
    group, row = piece.start, 0
    try:
        with parquet.ParquetFile(path) as file:
            missing = [key for key in keys if key not in file.schema_arrow.names]
            if missing:
                yield Found(str(path), None, f"no key {missing[0]}")
                return
            end = file.num_row_groups if piece.end is None else piece.end
            for group in range(piece.start, end):
                row = 0
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=list(keys)):
                    for found in _rows(batch):
                        where = f"{path}, row {row} of row group {group}"
                        yield Found(where, None, "not UTF-8") if found is None else of_row(found, keys, where)
                        row += 1
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Found(f"{path} behind row {row} of row group {group} ({reason})", None, _DAMAGED)


def _rows(batch: Any) -> list[Any]:
    """Of an arrow record batch, which decodes texts only now; None for a row in which one is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [None] if len(batch) == 1 else [row for at in range(len(batch)) for row in _rows(batch.slice(at, 1))]


def _cut_row_groups(name: str, path: Path, part_bytes: int) -> list[Slice]:
    """Row groups together until they hold `part_bytes`; a damaged file stays whole, to be found out by its reader."""
    parquet, arrow = (optional(module, str(path)) for module in ("pyarrow.parquet", "pyarrow"))
    try:
        with parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (arrow.ArrowException, OSError):
        return [Slice(name)]
    starts, size = [0], 0
    for group, found in enumerate(sizes):
        if size and size + found > part_bytes:
            starts.append(group)
            size = 0
        size += found
    return [Slice(name, start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


# A longer end of a name stands before one that it ends in.
FORMATS = {
    ".jsonl": Format(_read_json_lines, cut_bytes),
    ".jsonl.gz": Format(_packed_json_lines(_gunzipped), None),
    ".jsonl.zst": Format(_packed_json_lines(_unzstd), None),
    ".parquet": Format(_read_parquet, _cut_row_groups),
    ".raw": Format(_read_articles, cut_bytes),  # wikitext's own files
    ".tokens": Format(_read_articles, cut_bytes),
    ".txt": Format(_read_text, cut_bytes, whole_text=True),
}
