"""Data sets of the Hugging Face `datasets` package: folders of `save_to_disk`, and names for `load_dataset`.

Rows are read from memory-mapped Arrow files; a slice is a range of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_prep.text import DocumentsConfig, DocumentSource
from data_prep.text_formats import Document, document_of_row
from scmdm.config.fields import PathKind, key
from scmdm.data.preparation.records import Part, Record, Slice, Tally
from scmdm.errors import UserError
from scmdm.system.package_data import optional

_ROWS = 256  # rows decoded at once
_SPLITS = {"train": None, "validation": "validation", "test": "test"}  # split in `datasets` -> split here; None: hash


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
        return tuple(name for name in self._splits() if _SPLITS[name]) if self.split is None else ()

    def files(self) -> dict[str, Path]:
        """Arrow files by split. Raises UserError when the data set cannot be loaded, or lacks a column."""
        found: dict[str, Path] = {}
        for split, rows in self._splits().items():
            for number, file in enumerate(rows.cache_files):
                found[f"{split}/{number:05}.arrow"] = Path(file["filename"])
        return found

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of rows of about `part_bytes` bytes, split by split."""
        parts = []
        for split, rows in self._splits().items():
            total = sum(Path(file["filename"]).stat().st_size for file in rows.cache_files)
            step = max(1, len(rows) * part_bytes // max(1, total))
            own = _SPLITS[split] if self.split is None else None
            parts += [Part((Slice(split, at, min(at + step, len(rows))),), own) for at in range(0, len(rows), step)]
        return parts

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield records of the documents; drop empty documents and rows without text."""
        for piece in part.slices:
            yield from self._records(self._documents(piece), tally)

    def _documents(self, piece: Slice) -> Iterator[Document]:
        rows = self._splits()[piece.file]
        end = len(rows) if piece.end is None else piece.end
        for start in range(piece.start, end, _ROWS):
            columns = rows[start : min(start + _ROWS, end)]
            for at, values in enumerate(zip(*(columns[name] for name in self.keys), strict=True), start):
                row = dict(zip(self.keys, values, strict=True))
                yield document_of_row(row, self.keys, f"{self.path}, row {at} of {piece.file}")

    def _splits(self) -> dict[str, Any]:
        found = _load(self.path, self.config, self.split)
        for split, rows in found.items():
            for name in self.keys:
                if name not in rows.column_names:
                    raise UserError(
                        f"{name} is not a column of split {split} of source.path={self.path}; set source.text_key, or "
                        f"source.prompt_key and source.response_key, to one of {', '.join(rows.column_names)}"
                    )
        return found


@lru_cache(maxsize=4)
def _load(path: str, config: str | None, split: str | None) -> dict[str, Any]:
    """Load data sets by split: `split`, or if it is None all of train, validation and test that exist."""
    datasets = optional("datasets", "source.name=huggingface", "huggingface")
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config, split=split)
    # A failed connection raises an OSError; a DatasetsError names a malformed line only in its cause.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        wanted = f"source.config={config}" + (f", source.split={split}" if split else "")
        raise UserError(f"source.path={path} ({wanted}) cannot be loaded as a data set: {reason}") from error
    if not isinstance(loaded, dict):
        return {split or "train": loaded}
    if split is None:
        return {name: loaded[name] for name in _SPLITS if name in loaded}
    if split not in loaded:
        raise UserError(f"source.split={split} is not in source.path={path}; it must be one of {', '.join(loaded)}")
    return {split: loaded[split]}
