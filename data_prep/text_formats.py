"""Formats of text files, whose readers yield documents in bounded memory.

A damaged file is read up to the damage, which is then reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from data_prep import text_files
from data_prep.tables import is_divisible_table, read_header, read_rows
from data_prep.text_files import DAMAGED, HAS_NUL, NOT_UTF_8, TextFile, decode
from scmdm.data.preparation.records import Slice, cut_bytes
from scmdm.errors import UserError
from scmdm.system.package_data import optional
from scmdm.system.untrusted import describe, parse_json_row, reading

_ROWS = 256  # rows of a parquet file decoded at once
_TOO_LONG, _MALFORMED = "over-long document", "malformed JSON"
_TITLE = re.compile(rb"\s*= [^=\n]+ =\s*")  # title of an article; headings of sections have more equals signs
_CHATS = ("messages", "conversations")  # usual keys of chats
_ROLES = ("system", "user", "assistant")
# Keys of a message that change neither what it says nor whether it is learned: the name of the speaker, and records of
# where a message comes from, as those of WildChat.
_BOOKKEEPING = frozenset(
    ("id", "name", "timestamp", "language", "country", "state", "hashed_ip", "header", "redacted", "toxic")
) | {"turn_identifier"}
_LEARNED = ("weight", "train")  # keys that say whether a message is learned, as 0 or 1
_BESIDE_CHATS = ("tools", "functions")  # keys of a row that a chat template would write into the conversation
_EMPTY: Sequence[Any] = (None, "", [], {}, "[]")
_KEYS_SHOWN = 10


@dataclass(frozen=True)
class Document:
    """A document of a file, or a place where none could be read: `text` is then None, and `problem` the reason."""

    where: str
    text: str | None
    problem: str = ""
    prompt: str | None = None  # precedes the text
    messages: Sequence[tuple[str, str]] | None = None  # of a chat: roles and contents


@dataclass(frozen=True)
class RowKeys:
    """Keys (or columns) of the text of a row, and of its prompt; or of a chat, which has both."""

    text: str = "text"
    prompt: str | None = None
    messages: str | None = None  # replaces the other two
    last_role: str | None = None  # of chats of any number of messages, for a chat template; None: chats of two
    offers_chats: bool = True  # whether the message of a missing key names the key of a source that reads chats

    @cached_property
    def names(self) -> tuple[str, ...]:
        if self.messages is not None:
            return (self.messages,)
        return (self.text,) if self.prompt is None else (self.prompt, self.text)

    def wanted(self, columns: Sequence[str]) -> list[str]:
        """Return the columns to read of a row: `names`, and those that would change the meaning of a chat."""
        beside = _BESIDE_CHATS if self.messages is not None else ()
        return [*self.names, *(name for name in beside if name in columns and name not in self.names)]


@dataclass(frozen=True)
class Format:
    """Functions of a format.

    `read(path, slice, keys)` yields the documents of a slice. A file is cut with `cut(name, path, part_bytes)` where
    `is_divisible(path)`; None: never.
    """

    read: Callable[[Path, Slice, RowKeys], Iterator[Document]]
    is_divisible: Callable[[Path], bool] | None
    cut: Callable[[str, Path, int], list[Slice]] = cut_bytes
    whole_text: bool = False  # the file is one document, and a slice some of its lines
    has_rows: bool = True  # with keys or columns, which prompts and chats need


def _read_text(path: Path, piece: Slice, _keys: RowKeys) -> Iterator[Document]:
    """Read a slice as one document, or a whole file in blocks."""
    file, longest = TextFile(path), text_files.LONGEST
    yield from _blocks(file, file.lines(piece), longest if piece.end is None else None)
    yield from _problem(file)


def _blocks(file: TextFile, lines: Iterable[tuple[int, bytes]], longest: int | None) -> Iterator[Document]:
    """Join lines, given with their places, into documents of up to `longest` bytes."""
    block: list[tuple[int, bytes]] = []
    size = 0
    for at, line in lines:
        if block and longest is not None and size + len(line) > longest:
            yield from _block(file, block)
            block, size = [], 0
        block.append((at, line))
        size += len(line)
    if block:
        yield from _block(file, block)


def _block(file: TextFile, lines: Sequence[tuple[int, bytes]]) -> Iterator[Document]:
    where = file.where(lines[0][0])
    text, _ = decode(b"".join(line for _, line in lines))
    if text is not None and all(len(line) <= text_files.LONGEST for _, line in lines):
        yield Document(where, text)
        return
    found = [_decoded(line, file.where(at)) for at, line in lines]
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
        if size > text_files.LONGEST:
            yield Document(where, None, _TOO_LONG)
            return
    if texts:
        yield Document(where, "".join(texts))


def lines_as_documents(found: Iterable[Document]) -> Iterator[Document]:
    """Divide the documents of a file into its lines, each with its line feed; a blank line becomes an empty text."""
    for place in found:
        if place.text is None:
            yield place
            continue
        *lines, last = place.text.replace("\r\n", "\n").split("\n")
        for line in (*(f"{line}\n" for line in lines), *([last] if last else [])):
            yield Document(place.where, line if line.strip() else "")


def _read_json_lines(path: Path, piece: Slice, keys: RowKeys) -> Iterator[Document]:
    file = TextFile(path)
    for at, line in file.lines(piece):
        if not line.isspace():
            yield _from_json(line, keys, file.where(at))
    yield from _problem(file)


def _read_json(path: Path, piece: Slice, keys: RowKeys) -> Iterator[Document]:
    head = next((line for _, line in TextFile(path).lines() if not line.isspace()), b"")
    if head.lstrip().startswith(b"["):
        raise UserError(f"{path} is one JSON array; write an object on each line, with `jq -c '.[]'` for example")
    yield from _read_json_lines(path, piece, keys)


def _read_articles(path: Path, piece: Slice, _keys: RowKeys) -> Iterator[Document]:
    """Read articles whose title is in the slice, up to the next title; text before the first title is an article."""
    file = TextFile(path)
    article: list[bytes] = []
    start, size = piece.start, 0
    for at, line in file.lines(Slice(piece.file, piece.start)):
        title, outside = _TITLE.fullmatch(line) is not None, piece.end is not None and at >= piece.end
        if title:
            yield from _article(article, file.where(start), size)
            article, start, size = [], at, 0
        if outside and not article:
            return
        if title or article or piece.start == 0:
            size += len(line)
            if size <= text_files.LONGEST:
                article.append(line)
    yield from _article(article, file.where(start), size)
    yield from _problem(file)


def _article(lines: list[bytes], where: str, size: int) -> Iterator[Document]:
    text = b"".join(lines)
    if size > text_files.LONGEST:
        yield Document(where, None, _TOO_LONG)
    elif text.strip():
        yield _decoded(text, where)


def _decoded(raw: bytes, where: str) -> Document:
    if len(raw) > text_files.LONGEST:
        return Document(where, None, _TOO_LONG)
    text, problem = decode(raw)
    return Document(where, text, problem)


def _problem(file: TextFile) -> Iterator[Document]:
    if file.problem is not None:
        yield Document(file.problem.where, None, file.problem.reason)


def _from_json(line: bytes, keys: RowKeys, where: str) -> Document:
    if len(line) > text_files.LONGEST:
        return Document(where, None, _TOO_LONG)
    text, problem = decode(line)
    if text is None:
        return Document(where, None, problem)
    try:
        row = parse_json_row(text)
    except (ValueError, RecursionError) as error:
        return Document(f"{where}: {describe(error)}", None, _MALFORMED)
    return document_of_row(row, keys, where)


def document_of_row(row: Any, keys: RowKeys, where: str) -> Document:
    """Make the document of a row (a mapping)."""
    if not isinstance(row, dict):
        return Document(f"{where}: {_kind(row)}", None, "not an object")
    for key in keys.names:
        value = row.get(key)
        if value is None:
            found = "it is null" if key in row else missing_key(list(row), keys)
            return Document(f"{where}: {found}", None, f"no key {key}")
        if keys.messages is not None:
            beside = next((name for name in _BESIDE_CHATS if row.get(name) not in _EMPTY), None)
            return Document(where, None, f"row with {beside}") if beside else _of_chat(value, keys, where)
        if not isinstance(value, str):
            return Document(f"{where}: {_kind(value)}", None, f"key {key} is not text")
        if problem := _text_problem(value):
            return Document(where, None, problem)
    return Document(where, row[keys.text], prompt=None if keys.prompt is None else row[keys.prompt])


def _of_chat(found: Any, keys: RowKeys, where: str) -> Document:
    """Make the document of a chat in OpenAI's form, for a chat template or as prompt and response."""
    key = keys.messages
    if not isinstance(found, list) or not found:
        return Document(f"{where}: {_kind(found)}", None, f"key {key} is no chat")
    messages = []
    for number, message in enumerate(found):
        text, problem = _content(message)
        if text is None:
            return Document(f"{where}, message {number}", None, f"key {key} has {problem}")
        if problem := _text_problem(text):
            return Document(f"{where}, message {number}", None, problem)
        messages.append((message["role"], text))
    roles = [role for role, _ in messages]
    if keys.last_role is None:
        if roles != ["user", "assistant"]:
            shown = f"{where}: roles {roles!r}"
            return Document(shown, None, f"key {key} is no chat of one user and one assistant message")
        return Document(where, messages[1][1], prompt=messages[0][1])
    if roles[-1] != keys.last_role:
        return Document(where, None, f"key {key} is a chat whose last message is not of the role {keys.last_role}")
    return Document(where, "".join(text for role, text in messages if role == keys.last_role), messages=messages)


def _content(message: Any) -> tuple[str | None, str]:
    """Return the text of a message of a chat; or None, and why there is none."""
    if not isinstance(message, dict):
        return None, "a message that is not an object"
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        return None, f"a message of another role than {', '.join(_ROLES)}"
    known = {"role", "content", *(name for name in _LEARNED if message.get(name) == (role == "assistant"))}
    if (unknown := _unknown_key(message, known | _BOOKKEEPING)) is not None:
        return None, f"a message with {unknown}"
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        if len(content) == 1 and (unknown := _unknown_key(content[0], {"type", "text"})) is not None:
            return None, f"content with {unknown}"
        content = content[0].get("text") if len(content) == 1 else None
    return (content, "") if isinstance(content, str) else (None, "content that is not text")


def _unknown_key(found: Mapping[str, Any], known: Collection[str]) -> str | None:
    """Return a key that is neither known nor empty, quoted and shortened; None if there is none."""
    return next((repr(name[:40]) for name, value in found.items() if name not in known and value not in _EMPTY), None)


def missing_key(names: Sequence[Any], keys: RowKeys) -> str:
    """Describe the keys that a row has instead of the wanted one, and how a chat is read."""
    shown = ", ".join(repr(str(name)[:40]) for name in names[:_KEYS_SHOWN])
    chat = next((name for name in _CHATS if name in names), None) if keys.offers_chats else None
    remedy = f"; read a chat with source.messages_key={chat}" if chat else ""
    return f"its keys are {shown or 'none'}{', ...' if len(names) > _KEYS_SHOWN else ''}{remedy}"


def _column_problem(columns: Sequence[str], keys: RowKeys, where: str) -> Document | None:
    """Return a document without text unless each of the keys is the name of one column."""
    for key in keys.names:
        if key not in columns:
            return Document(f"{where}: {missing_key(columns, keys)}", None, f"no key {key}")
        if (count := columns.count(key)) > 1:
            return Document(f"{where}: {count} columns have this name", None, f"key {key} more than once")
    return None


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bytes: "bytes",
        bool: "a truth value",
        type(None): "null",
    }
    return f"it is {names.get(type(value), 'a number' if isinstance(value, int | float) else type(value).__name__)}"


def _text_problem(text: str) -> str:
    """Return why a value is not text: JSON may contain a lone surrogate, which is not a character."""
    if "\0" in text:
        return HAS_NUL
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return NOT_UTF_8
    return ""


def _read_table(table_format: str, path: Path, piece: Slice, keys: RowKeys) -> Iterator[Document]:
    file = TextFile(path)
    header = read_header(file, keys.names, table_format)
    if header is None:
        if piece.start == 0:
            yield from _problem(file) if file.problem else [Document(str(path), None, "no header")]
        return
    if (problem := _column_problem(header.columns, keys, str(path))) is not None:
        if piece.start == 0:
            yield problem
        return
    positions = {name: header.columns.index(name) for name in keys.names}
    for row in read_rows(file, header, piece):
        if row.problem:
            yield Document(file.where(row.at), None, row.problem)
            continue
        values = {name: row.fields[at] for name, at in positions.items() if at < len(row.fields)}
        yield document_of_row(values, keys, file.where(row.at))
    yield from _problem(file)


def _read_parquet(path: Path, piece: Slice, keys: RowKeys) -> Iterator[Document]:
    """Read row groups a few rows at a time, to bound the memory of large ones."""
    parquet = optional("pyarrow.parquet", str(path), "text")
    group, row = piece.start, 0
    try:
        with reading(path, "parquet file"), parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if (problem := _column_problem(columns, keys, str(path))) is not None:
                yield problem
                return
            end = file.num_row_groups if piece.end is None else piece.end
            for group in range(piece.start, end):
                row = 0
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=keys.wanted(columns)):
                    for found in _rows(batch, path):
                        where = f"{path}, row {row} of row group {group}"
                        yield (
                            Document(where, None, found)
                            if isinstance(found, str)
                            else document_of_row(found, keys, where)
                        )
                        row += 1
                # For some damage of a page the library ends the rows without an error.
                if row != (expected := file.metadata.row_group(group).num_rows):
                    raise UserError(f"{row} of {expected} rows")
    except UserError as error:
        yield Document(f"{path} after row {row} of row group {group} ({error})", None, DAMAGED)


def _rows(batch: Any, path: Path) -> list[Any]:
    """Decode the rows of an Arrow record batch; a string in place of a row is the reason why it cannot be decoded."""
    try:
        with reading(path, "row"):
            return list(batch.to_pylist())
    except UserError as error:
        if len(batch) > 1:
            return [row for at in range(len(batch)) for row in _rows(batch.slice(at, 1), path)]
        return [NOT_UTF_8 if isinstance(error.__cause__, UnicodeDecodeError) else "unreadable row"]


def _cut_row_groups(name: str, path: Path, part_bytes: int) -> list[Slice]:
    """Cut a file into slices of row groups. A damaged file stays whole, and its reader reports the damage."""
    parquet = optional("pyarrow.parquet", str(path), "text")
    try:
        with reading(path, "parquet file"), parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except UserError:
        return [Slice(name)]
    starts, size = [0], 0
    for group, found in enumerate(sizes):
        if size and size + found > part_bytes:
            starts.append(group)
            size = 0
        size += found
    return [Slice(name, start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _is_divisible(path: Path) -> bool:
    return TextFile(path).is_divisible


# By the values of `corpus_files.SUFFIXES`.
FORMATS: Mapping[str, Format] = {
    "text": Format(_read_text, _is_divisible, whole_text=True, has_rows=False),
    "jsonl": Format(_read_json_lines, _is_divisible),
    "parquet": Format(_read_parquet, lambda _: True, _cut_row_groups),
    "wikitext": Format(_read_articles, _is_divisible, has_rows=False),
    "json": Format(_read_json, _is_divisible),
    "csv": Format(partial(_read_table, "csv"), is_divisible_table),
    "tsv": Format(partial(_read_table, "tsv"), is_divisible_table),
}
# Not read from folders, where such files often hold metadata.
ONLY_BY_NAME = frozenset({"json", "csv", "tsv"})
