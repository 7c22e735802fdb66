"""Data sets of the Hugging Face `datasets` package: a folder written by `save_to_disk`, or what `load_dataset` finds.

Rows are read through memory-mapped Arrow files, of which a slice is a range of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.formats import Found, of_row
from data_prep.text import Units
from scmdm.data.preparation.records import Part, Record, Slice, Tally
from scmdm.errors import UserError
from scmdm.system.package_data import optional

_ROWS = 256  # decoded at once
_SPLITS = {"train": None, "validation": "validation", "test": "test"}  # theirs: ours (None: by hash)


class HuggingFace:
    """Texts of one split of a data set, or of all of them (`split` None) under their own names.

    The keys are the column of the text, or those of a prompt and of the text.
    """

    whole_records = False
    labels: tuple[str, ...] = ()

    def __init__(self, path: str, config: str | None, split: str | None, keys: Sequence[str], units: Units) -> None:
        self.path, self.config, self.split, self.keys, self._units = path, config, split, keys, units
        self.name = Path(path).name

    @property
    def published(self) -> tuple[str, ...]:
        """Splits that the data set names itself."""
        return tuple(name for name in self._splits() if _SPLITS[name]) if self.split is None else ()

    def files(self) -> dict[str, Path]:
        """The Arrow files, by split. Raises UserError when there is no such data set, or it has no such column."""
        found: dict[str, Path] = {}
        for split, rows in self._splits().items():
            for number, file in enumerate(rows.cache_files):
                found[f"{split}/{number:05}.arrow"] = Path(file["filename"])
        return found

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of rows of about so many bytes, split by split."""
        parts = []
        for split, rows in self._splits().items():
            total = sum(Path(file["filename"]).stat().st_size for file in rows.cache_files)
            step = max(1, len(rows) * part_bytes // max(1, total))
            own = _SPLITS[split] if self.split is None else None
            parts += [Part((Slice(split, at, min(at + step, len(rows))),), own) for at in range(0, len(rows), step)]
        return parts

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Units of the documents; what is empty or no text is left out."""
        for piece in part.slices:
            yield from self._units.records(self._found(piece), tally)

    def _found(self, piece: Slice) -> Iterator[Found]:
        rows = self._splits()[piece.file]
        end = len(rows) if piece.end is None else piece.end
        for start in range(piece.start, end, _ROWS):
            columns = rows[start : min(start + _ROWS, end)]
            for at, values in enumerate(zip(*(columns[key] for key in self.keys), strict=True), start):
                row = dict(zip(self.keys, values, strict=True))
                yield of_row(row, self.keys, f"{self.path}, row {at} of {piece.file}")

    def _splits(self) -> dict[str, Any]:
        found = _load(self.path, self.config, self.split)
        for split, rows in found.items():
            for key in self.keys:
                if key not in rows.column_names:
                    raise UserError(
                        f"{key} is no column of split {split} of path={self.path}; it has "
                        f"{', '.join(rows.column_names)}: set text_key, or prompt_key and response_key"
                    )
        return found


@lru_cache(maxsize=4)
def _load(path: str, config: str | None, split: str | None) -> dict[str, Any]:
    """Data sets by split: all of those that we know, or the one that was asked for."""
    datasets = optional("datasets", "source=huggingface")
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config, split=split)
    # A connection's failure is an OSError; a line that is broken is the cause of a DatasetsError that does not name it.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())[:300]
        wanted = f"hf_config={config}, hf_split={split}" if split else f"hf_config={config}"
        raise UserError(f"path={path} ({wanted}) is no data set that can be loaded: {reason}") from error
    if not isinstance(loaded, dict):
        return {split or "train": loaded}
    if split is None:
        return {name: loaded[name] for name in _SPLITS if name in loaded}
    if split not in loaded:
        raise UserError(f"hf_split={split} is not in path={path}; it has {', '.join(loaded)}")
    return {split: loaded[split]}
