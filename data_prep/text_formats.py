"""Files of text by their suffix: what lies in them, document by document, in bounded memory.

A damaged file gives what is whole before the damage, and then says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.packed import PackedLines, Unpack, gunzipped, unzstd
from scmdm.data.preparation.records import Slice, cut_bytes, read_lines
from scmdm.errors import UserError
from scmdm.system.package_data import optional

_PEEKED = 1 << 16  # bytes in which an array would begin
_ROWS = 256  # of a parquet file, decoded at once
_DAMAGED, _TOO_LONG = "damaged file", "over-long document"
LONGEST = 1 << 26  # bytes of a line or a document, of which memory holds one
# Of names whose content would be taken for text.
_NO_TEXT = (
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".csv",
    ".tsv",
    ".arrow",
    ".pdf",
    ".npy",
    ".npz",
)
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
    """By the end of the name, in capitals or not; a file of any other name is plain text.

    Raises UserError for a name that says that it is something else.
    """
    name = path.name.lower()
    known = FORMATS | _ONLY_NAMED
    found = next((known[suffix] for suffix in known if name.endswith(suffix)), None)
    if found is None and name.endswith(_NO_TEXT):
        raise UserError(f"{path} is no text that can be read; give one of {', '.join(known)}")
    return found or FORMATS[".txt"]


def is_known(path: Path) -> bool:
    """Whether a folder's file is taken for one of text."""
    return path.name.lower().endswith(tuple(FORMATS))


def _read_text(path: Path, piece: Slice, _keys: Sequence[str]) -> Iterator[Found]:
    """The whole slice, or blocks of it where it is a whole file."""
    lines = read_lines(path, piece, LONGEST)
    yield from _blocks(((f"{path} at byte {at}", line) for at, line in lines), LONGEST if piece.end is None else None)


def _blocks(lines: Iterable[tuple[str, bytes]], longest: int | None) -> Iterator[Found]:
    """Text of as many lines, each with its place, as have less than `longest` bytes together."""
    block: list[tuple[str, bytes]] = []
    size = 0
    for where, line in lines:
        if block and longest is not None and size + len(line) > longest:
            yield from _block(block)
            block, size = [], 0
        block.append((where, line))
        size += len(line)
    if block:
        yield from _block(block)


def _block(lines: Sequence[tuple[str, bytes]]) -> Iterator[Found]:
    where, _ = lines[0]
    whole = _decoded(b"".join(line for _, line in lines), where)
    if whole.text is not None and all(len(line) <= LONGEST for _, line in lines):
        yield whole
        return
    found = [_decoded(line, place) if len(line) <= LONGEST else Found(place, None, _TOO_LONG) for place, line in lines]
    yield from (line for line in found if line.text is None)
    rest = "".join(line.text for line in found if line.text is not None)
    if rest.strip():
        yield Found(where, rest)


def as_one_document(found: Iterable[Found], where: str) -> Iterator[Found]:
    """The texts of a file as one, behind what cannot be used of it; one that is too long is not read to its end."""
    texts: list[str] = []
    size = 0
    for place in found:
        if place.text is None:
            yield place
            continue
        texts.append(place.text)
        size += len(place.text)
        if size > LONGEST:
            yield Found(where, None, _TOO_LONG)
            return
    if texts:
        yield Found(where, "".join(texts))


def _read_json_lines(path: Path, piece: Slice, keys: Sequence[str]) -> Iterator[Found]:
    for at, line in read_lines(path, piece, LONGEST):
        if line.strip():
            yield _from_json(line, keys, f"{path} at byte {at}")


def _read_json(path: Path, piece: Slice, keys: Sequence[str]) -> Iterator[Found]:
    with open(path, "rb") as file:
        if file.read(_PEEKED).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
            raise UserError(f"{path} is one JSON array; write an object on each line, with `jq -c '.[]'` for example")
    yield from _read_json_lines(path, piece, keys)


def _read_articles(path: Path, piece: Slice, _keys: Sequence[str]) -> Iterator[Found]:
    """Articles whose title is in the slice, each to the next title; text before the first title is one by itself."""
    article: list[bytes] = []
    start, size = piece.start, 0
    for at, line in read_lines(path, Slice(piece.file, piece.start), LONGEST):
        title, outside = _TITLE.fullmatch(line) is not None, piece.end is not None and at >= piece.end
        if title:
            yield from _article(article, f"{path} at byte {start}", size)
            article, start, size = [], at, 0
        if outside and not article:
            return
        if title or article or piece.start == 0:
            size += len(line)
            if size <= LONGEST:
                article.append(line)
    yield from _article(article, f"{path} at byte {start}", size)


def _article(lines: list[bytes], where: str, size: int) -> Iterator[Found]:
    text = b"".join(lines)
    if size > LONGEST:
        yield Found(where, None, _TOO_LONG)
    elif text.strip():
        yield _decoded(text, where)


def _decoded(raw: bytes, where: str) -> Found:
    try:
        return Found(where, raw.decode())
    except UnicodeDecodeError:
        return Found(where, None, "not UTF-8")


def _from_json(line: bytes, keys: Sequence[str], where: str) -> Found:
    if len(line) > LONGEST:
        return Found(where, None, _TOO_LONG)
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


def _packed_json_lines(unpack: Unpack) -> Callable[..., Iterator[Found]]:
    def read(path: Path, _piece: Slice, keys: Sequence[str]) -> Iterator[Found]:
        stream = PackedLines(path, unpack, LONGEST)
        for where, line in stream:
            if line.strip():
                yield _from_json(line, keys, where)
        yield from _damage(stream)

    return read


def _packed_text(unpack: Unpack) -> Callable[..., Iterator[Found]]:
    def read(path: Path, _piece: Slice, _keys: Sequence[str]) -> Iterator[Found]:
        stream = PackedLines(path, unpack, LONGEST)
        yield from _blocks(stream, LONGEST)
        yield from _damage(stream)

    return read


def _damage(stream: PackedLines) -> Iterator[Found]:
    if stream.damage is not None:
        yield Found(stream.damage, None, _DAMAGED)


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
    ".jsonl.gz": Format(_packed_json_lines(gunzipped), None),
    ".jsonl.zst": Format(_packed_json_lines(unzstd), None),
    ".txt.gz": Format(_packed_text(gunzipped), None, whole_text=True),
    ".txt.zst": Format(_packed_text(unzstd), None, whole_text=True),
    ".parquet": Format(_read_parquet, _cut_row_groups),
    ".raw": Format(_read_articles, cut_bytes),  # wikitext's own files
    ".tokens": Format(_read_articles, cut_bytes),
    ".txt": Format(_read_text, cut_bytes, whole_text=True),
}
# In a folder such a file is more often about the texts than one of them.
_ONLY_NAMED = {".json": Format(_read_json, cut_bytes)}
