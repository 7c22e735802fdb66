"""Formats of text files by suffix, whose readers yield documents in bounded memory.

A damaged file is read up to the damage, which is then reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.compressed import CompressedLines, Decompress, gunzip, unzstd
from scmdm.data.preparation.records import Slice, cut_bytes, read_lines
from scmdm.errors import UserError
from scmdm.system.package_data import optional

_PEEKED = 1 << 16  # bytes that are searched for the start of a JSON array
_ROWS = 256  # rows of a parquet file decoded at once
_DAMAGED, _TOO_LONG = "damaged file", "over-long document"
LONGEST = 1 << 26  # bytes of a line or a document; longer ones are dropped
# Suffixes of files that would otherwise be read as plain text.
_OTHER_SUFFIXES = (
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
_TITLE = re.compile(rb"\s*= [^=\n]+ =\s*")  # title of an article; headings of sections have more equals signs


@dataclass(frozen=True)
class Document:
    """A document of a file, or a place where none could be read: `text` is then None, and `problem` the reason."""

    where: str
    text: str | None
    problem: str = ""
    prompt: str | None = None  # precedes the text


Cut = Callable[[str, Path, int], list[Slice]]


@dataclass(frozen=True)
class Format:
    """Functions of a format.

    `read(path, slice, keys)` yields the documents of a slice; `keys` is the key (column) of the text, or the keys of
    prompt and text. `cut(name, path, part_bytes)` cuts a large file into slices; None: the format has no slices.
    """

    read: Callable[[Path, Slice, Sequence[str]], Iterator[Document]]
    cut: Cut | None
    whole_text: bool = False  # the file is one document, and a slice some of its lines


def format_of(path: Path) -> Format:
    """Return the format of a file by its suffix, ignoring case; an unknown suffix means plain text.

    Raises UserError for a suffix that is known not to be text, such as .csv.
    """
    name = path.name.lower()
    known = FORMATS | _ONLY_BY_NAME
    found = next((known[suffix] for suffix in known if name.endswith(suffix)), None)
    if found is None and name.endswith(_OTHER_SUFFIXES):
        raise UserError(f"{path} is not a text file; its suffix must be one of {', '.join(known)}")
    return found or FORMATS[".txt"]


def is_known(path: Path) -> bool:
    """Return whether a file in a folder is read as text."""
    return path.name.lower().endswith(tuple(FORMATS))


def _read_text(path: Path, piece: Slice, _keys: Sequence[str]) -> Iterator[Document]:
    """Read a slice as one document, or a whole file in blocks."""
    lines = read_lines(path, piece, LONGEST)
    yield from _blocks(((f"{path} at byte {at}", line) for at, line in lines), LONGEST if piece.end is None else None)


def _blocks(lines: Iterable[tuple[str, bytes]], longest: int | None) -> Iterator[Document]:
    """Join lines, given with their places, into documents of up to `longest` bytes."""
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


def _block(lines: Sequence[tuple[str, bytes]]) -> Iterator[Document]:
    where, _ = lines[0]
    whole = _decoded(b"".join(line for _, line in lines), where)
    if whole.text is not None and all(len(line) <= LONGEST for _, line in lines):
        yield whole
        return
    found = [
        _decoded(line, place) if len(line) <= LONGEST else Document(place, None, _TOO_LONG) for place, line in lines
    ]
    yield from (line for line in found if line.text is None)
    rest = "".join(line.text for line in found if line.text is not None)
    if rest.strip():
        yield Document(where, rest)


def as_one_document(found: Iterable[Document], where: str) -> Iterator[Document]:
    """Join the documents of a file into one, after its problems. Stops reading when the text exceeds `LONGEST`."""
    texts: list[str] = []
    size = 0
    for place in found:
        if place.text is None:
            yield place
            continue
        texts.append(place.text)
        size += len(place.text)
        if size > LONGEST:
            yield Document(where, None, _TOO_LONG)
            return
    if texts:
        yield Document(where, "".join(texts))


def _read_json_lines(path: Path, piece: Slice, keys: Sequence[str]) -> Iterator[Document]:
    for at, line in read_lines(path, piece, LONGEST):
        if line.strip():
            yield _from_json(line, keys, f"{path} at byte {at}")


def _read_json(path: Path, piece: Slice, keys: Sequence[str]) -> Iterator[Document]:
    with open(path, "rb") as file:
        if file.read(_PEEKED).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
            raise UserError(f"{path} is one JSON array; write an object on each line, with `jq -c '.[]'` for example")
    yield from _read_json_lines(path, piece, keys)


def _read_articles(path: Path, piece: Slice, _keys: Sequence[str]) -> Iterator[Document]:
    """Read articles whose title is in the slice, up to the next title; text before the first title is an article."""
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


def _article(lines: list[bytes], where: str, size: int) -> Iterator[Document]:
    text = b"".join(lines)
    if size > LONGEST:
        yield Document(where, None, _TOO_LONG)
    elif text.strip():
        yield _decoded(text, where)


def _decoded(raw: bytes, where: str) -> Document:
    try:
        return Document(where, raw.decode())
    except UnicodeDecodeError:
        return Document(where, None, "not UTF-8")


def _from_json(line: bytes, keys: Sequence[str], where: str) -> Document:
    if len(line) > LONGEST:
        return Document(where, None, _TOO_LONG)
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return Document(where, None, "not UTF-8")
    except (json.JSONDecodeError, RecursionError):
        return Document(where, None, f"no key {keys[-1]}")
    return document_of_row(row, keys, where)


def document_of_row(row: Any, keys: Sequence[str], where: str) -> Document:
    """Make the document of a row (a mapping). Two keys are those of the prompt and the text."""
    values = [row.get(key) if isinstance(row, dict) else None for key in keys]
    for key, value in zip(keys, values, strict=True):
        if not isinstance(value, str):
            return Document(where, None, f"no key {key}")
        if not _is_unicode(value):
            return Document(where, None, "not UTF-8")
    return Document(where, values[-1], prompt=values[0] if len(keys) == 2 else None)


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: JSON may contain a lone surrogate, which is not a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _compressed_json_lines(decompress: Decompress) -> Callable[..., Iterator[Document]]:
    def read(path: Path, _piece: Slice, keys: Sequence[str]) -> Iterator[Document]:
        stream = CompressedLines(path, decompress, LONGEST)
        for where, line in stream:
            if line.strip():
                yield _from_json(line, keys, where)
        yield from _damage(stream)

    return read


def _compressed_text(decompress: Decompress) -> Callable[..., Iterator[Document]]:
    def read(path: Path, _piece: Slice, _keys: Sequence[str]) -> Iterator[Document]:
        stream = CompressedLines(path, decompress, LONGEST)
        yield from _blocks(stream, LONGEST)
        yield from _damage(stream)

    return read


def _damage(stream: CompressedLines) -> Iterator[Document]:
    if stream.damage is not None:
        yield Document(stream.damage, None, _DAMAGED)


def _read_parquet(path: Path, piece: Slice, keys: Sequence[str]) -> Iterator[Document]:
    """Read row groups a few rows at a time, to bound the memory of large ones."""
    parquet, arrow = (optional(module, str(path), "text") for module in ("pyarrow.parquet", "pyarrow"))
    group, row = piece.start, 0
    try:
        with parquet.ParquetFile(path) as file:
            missing = [key for key in keys if key not in file.schema_arrow.names]
            if missing:
                yield Document(str(path), None, f"no key {missing[0]}")
                return
            end = file.num_row_groups if piece.end is None else piece.end
            for group in range(piece.start, end):
                row = 0
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=list(keys)):
                    for found in _rows(batch):
                        where = f"{path}, row {row} of row group {group}"
                        yield (
                            Document(where, None, "not UTF-8") if found is None else document_of_row(found, keys, where)
                        )
                        row += 1
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Document(f"{path} after row {row} of row group {group} ({reason})", None, _DAMAGED)


def _rows(batch: Any) -> list[Any]:
    """Decode the rows of an Arrow record batch; None for a row that is not UTF-8, which only decoding reveals."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [None] if len(batch) == 1 else [row for at in range(len(batch)) for row in _rows(batch.slice(at, 1))]


def _cut_row_groups(name: str, path: Path, part_bytes: int) -> list[Slice]:
    """Cut a file into slices of row groups. A damaged file stays whole, and its reader reports the damage."""
    parquet, arrow = (optional(module, str(path), "text") for module in ("pyarrow.parquet", "pyarrow"))
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


# The first matching suffix wins, so longer suffixes come first.
FORMATS = {
    ".jsonl": Format(_read_json_lines, cut_bytes),
    ".jsonl.gz": Format(_compressed_json_lines(gunzip), None),
    ".jsonl.zst": Format(_compressed_json_lines(unzstd), None),
    ".txt.gz": Format(_compressed_text(gunzip), None, whole_text=True),
    ".txt.zst": Format(_compressed_text(unzstd), None, whole_text=True),
    ".parquet": Format(_read_parquet, _cut_row_groups),
    ".raw": Format(_read_articles, cut_bytes),  # files of Wikitext
    ".tokens": Format(_read_articles, cut_bytes),
    ".txt": Format(_read_text, cut_bytes, whole_text=True),
}
# Not read from folders, where such a file often holds metadata.
_ONLY_BY_NAME = {".json": Format(_read_json, cut_bytes)}
