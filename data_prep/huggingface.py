"""Data sets of the Hugging Face `datasets` package: folders of `save_to_disk`, and names for `load_dataset`.

Rows are read from memory-mapped Arrow files; a slice is a range of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_prep.corpus_files import SPLIT_ORDER, named_split, published_splits, split_of_name
from data_prep.text import DocumentsConfig, DocumentSource
from data_prep.text_formats import Document, document_of_row
from scmdm.config.fields import PathKind, key
from scmdm.data.preparation.records import Part, Record, Slice, Tally
from scmdm.errors import UserError
from scmdm.system.package_data import optional
from scmdm.system.untrusted import reading

_ROWS = 256  # rows decoded at once


@dataclass
class HuggingFaceSourceConfig(DocumentsConfig):
    """Keys of the source `huggingface`."""

    path: str = key(
        MISSING,
        path=PathKind.INPUT,
        formerly=("path",),
        help="folder that save_to_disk wrote, or a name for load_dataset",
    )
    config: str | None = key(None, formerly=("hf_config",), help="name of the data set's configuration")
    split: str = key("train", formerly=("hf_split",), help="split to read; split_by=names reads all splits")

    def validate(self) -> None:
        super().validate()
        if self.splits_by_name and self.split != "train":
            raise UserError(
                f"source.split={self.split} has no effect with source.split_by=names; leave one of them out"
            )


class HuggingFaceSource(DocumentSource):
    """Texts of one split of a data set, or of all its splits under their own names (`split_by=names`)."""

    Config = HuggingFaceSourceConfig

    def __init__(self, config: HuggingFaceSourceConfig, length: int) -> None:
        super().__init__(config, length)
        self.path, self.config = config.path, config.config
        self.split = None if config.splits_by_name else config.split
        self.name = Path(config.path).name

    @property
    def published(self) -> tuple[str, ...]:
        """Validation and test splits of the data set, with `split_by=names`."""
        return published_splits({name: split_of_name(name) for name in self._splits()}) if self.split is None else ()

    @property
    def skipped(self) -> Mapping[str, Sequence[str]]:
        """Splits of other names, with `split_by=names`."""
        others = [] if self.split is not None else [n for n in _load_all(self.path, self.config) if not named_split(n)]
        return {"split of another name": others} if others else {}

    def files(self) -> dict[str, Path]:
        """Arrow files by split. Raises UserError when the data set cannot be loaded, or lacks a column."""
        found: dict[str, Path] = {}
        for split, rows in self._splits().items():
            for number, file in enumerate(rows.cache_files):
                found[f"{split}/{number:05}.arrow"] = Path(file["filename"])
        return found

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of rows of about `part_bytes` bytes, split by split. Raises UserError when there are no rows."""
        parts = []
        for split, rows in self._splits().items():
            total = sum(Path(file["filename"]).stat().st_size for file in rows.cache_files)
            step = max(1, len(rows) * part_bytes // max(1, total))
            own = split_of_name(split) if self.split is None else None
            parts += [Part((Slice(split, at, min(at + step, len(rows))),), own) for at in range(0, len(rows), step)]
        if not parts:
            raise UserError(
                f"source.path={self.path} has no rows in {', '.join(f'split {name}' for name in self._splits())}; give "
                "another source.split, or another data set"
            )
        return parts

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield records of the documents; drop empty documents and rows without text."""
        for piece in part.slices:
            yield from self._records(self._documents(piece), tally)

    def _documents(self, piece: Slice) -> Iterator[Document]:
        rows = self._splits()[piece.file]
        rows = rows.select_columns(self.keys.wanted(rows.column_names))  # no other column is decoded
        end = len(rows) if piece.end is None else piece.end
        for start in range(piece.start, end, _ROWS):
            for at, row in enumerate(self._rows(rows, start, min(start + _ROWS, end)), start):
                where = f"{self.path}, row {at} of {piece.file}"
                yield Document(where, None, "unreadable row") if row is None else document_of_row(row, self.keys, where)

    def _rows(self, rows: Any, start: int, end: int) -> list[dict[str, Any] | None]:
        """Decode a range of rows; None for a row that cannot be decoded."""
        names = rows.column_names
        try:
            with reading(self.path, "data set"):
                columns = rows[start:end]
                return [dict(zip(names, row, strict=True)) for row in zip(*(columns[n] for n in names), strict=True)]
        except UserError:
            return (
                [None]
                if end - start == 1
                else [row for at in range(start, end) for row in self._rows(rows, at, at + 1)]
            )

    def _splits(self) -> dict[str, Any]:
        found = _load(self.path, self.config, self.split)
        for split, rows in found.items():
            for name in self.keys.names:
                if name not in rows.column_names:
                    raise UserError(
                        f"{name} is not a column of split {split} of source.path={self.path}; set source.text_key, or "
                        f"source.prompt_key and source.response_key, or source.messages_key, to one of "
                        f"{', '.join(rows.column_names)}"
                    )
        return found


@lru_cache(maxsize=4)
def _load(path: str, config: str | None, split: str | None) -> dict[str, Any]:
    """Load data sets by split: `split`, or if it is None all that are named like splits, the training set first."""
    if split is None:
        loaded = _load_all(path, config)
        found = [name for name in loaded if named_split(name)]
        if not found:
            raise UserError(
                f"source.split_by=names is not possible with source.path={path}, whose splits are {', '.join(loaded)}; "
                "set source.split to one of them"
            )
        return {name: loaded[name] for name in sorted(found, key=lambda name: SPLIT_ORDER.index(split_of_name(name)))}
    loaded = _load_all(path, config, split)
    if split not in loaded:
        raise UserError(f"source.split={split} is not in source.path={path}; it must be one of {', '.join(loaded)}")
    return {split: loaded[split]}


@lru_cache(maxsize=4)
def _load_all(path: str, config: str | None, split: str | None = None) -> dict[str, Any]:
    """Load the data sets of a folder or a name, at least that of `split`."""
    datasets = optional("datasets", "source.name=huggingface", "huggingface")
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    if saved and config is not None:
        raise UserError(
            f"source.config={config} has no effect with source.path={path}, a folder that save_to_disk wrote; leave it "
            "out"
        )
    try:
        if saved:
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config, split=split, trust_remote_code=False)
    except Exception as error:
        # A DatasetsError names a malformed line only in its cause.
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        wanted = f"source.config={config}" + (f", source.split={split}" if split else "")
        raise UserError(f"source.path={path} ({wanted}) cannot be loaded as a data set: {reason}") from error
    return dict(loaded) if isinstance(loaded, dict) else {split or "train": loaded}
