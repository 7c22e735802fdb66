"""Molecules in the user's files: SMILES, blank, name on a line; or tables with a header. Compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data_prep.corpus_files import (
    FoundFiles,
    NamedFiles,
    NamedSplitsConfig,
    find_files,
    kind_of,
)
from data_prep.tables import TableHeader, is_divisible_table, read_header, read_rows
from data_prep.text_files import FileProblem, TextFile, decode
from scmdm.config.fields import PathKind, key
from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError
from scmdm.system.package_data import optional

_TABLES = ("csv", "tsv")


@cache
def _rdkit() -> tuple[Any, Any]:
    chem, base = (optional(module, "canonical SMILES", "molecules") for module in ("rdkit.Chem", "rdkit.rdBase"))
    return chem, base


def canonical_smiles(smiles: str) -> str | None:
    """Return RDKit's canonical SMILES with implicit hydrogens; None for an invalid or empty molecule."""
    chem, base = _rdkit()
    with base.BlockLogs():
        molecule = chem.MolFromSmiles(smiles)
    return None if molecule is None else chem.MolToSmiles(molecule) or None


@dataclass
class SmilesSourceConfig(NamedSplitsConfig):
    """Keys of the source `smiles`."""

    path: str = key(
        MISSING,
        path=PathKind.INPUT,
        formerly=("path",),
        help=".smi, .txt, .csv or .tsv file, or a folder of .smi, .csv and .tsv files",
    )
    column: str = key("SMILES", formerly=("smiles_column",), help="column with SMILES in .csv and .tsv files")


class SmilesSource(NamedFiles, Source):
    """Canonical SMILES of a file, or of all files below a folder, sorted by path; a record is one line.

    See `Qm9Source` for the reasons for the canonical form.
    """

    Config = SmilesSourceConfig
    tokenizers = ("smiles", "selfies")

    def __init__(self, config: SmilesSourceConfig, length: int) -> None:
        self.path, self.column, self._split_by = Path(config.path), config.column, config.split_by
        self.name = self.path.name

    def _find(self) -> FoundFiles:
        return find_files(self.path, ("smi", *_TABLES), by_name=("text",), remedy=_REMEDY)

    def parts(self, part_bytes: int) -> list[Part]:
        """Group small files, and divide large ones into lines.

        Raises UserError for a table without the column, and if `column` is set but no file is a table.
        """
        tables = [path for path in self.files().values() if _is_table(path)]
        if not tables and self.column != SmilesSourceConfig.column:
            raise UserError(
                f"source.column={self.column} has no effect with source.path={self.path}, where no file is a table; "
                "leave it out"
            )
        for path in tables:
            self._header(TextFile(path))
        return super().parts(part_bytes)

    def _cut(self, files: dict[str, Path], split: str | None, part_bytes: int) -> list[Part]:
        return cut_into_parts(files, part_bytes, _is_divisible, split)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield canonical SMILES; drop those that RDKit cannot parse."""
        for piece in part.slices:
            file = TextFile(self.files()[piece.file])
            spellings = self._of_table if _is_table(file.path) else _of_lines
            for at, smiles, problem in spellings(file, piece):
                tally.read()
                canonical = None if problem else canonical_smiles(smiles)
                if canonical is None:
                    tally.drop(problem or "not a molecule", f"{file.where(at)}: {smiles[:200]}")
                else:
                    yield Record(canonical)
            if file.problem is not None:
                tally.drop(file.problem.reason, file.problem.where)

    def _of_table(self, file: TextFile, piece: Slice) -> Iterator[tuple[int, str, str]]:
        """Yield place, SMILES and problem of each row. Without a header, set the problem of the file."""
        header = self._header(file)
        position = header.position(self.column) if header is not None else None
        if header is None or position is None:
            if piece.start == 0:
                file.problem = file.problem or FileProblem("no header", str(file.path))
            return
        for row in read_rows(file, header, piece):
            short = not row.problem and position >= len(row.fields)
            smiles = "" if row.problem or short else row.fields[position].strip()
            yield row.at, smiles, "no such column in the row" if short else row.problem

    def _header(self, file: TextFile) -> TableHeader | None:
        """Read the header of a table. Raises UserError unless it has the column exactly once."""
        header = read_header(file, [self.column])
        if header is not None and header.position(self.column) is None:
            count = header.columns.count(self.column)
            raise UserError(
                f"source.column={self.column} is {f'{count} times' if count else 'not'} in the header of {file.path}; "
                f"it must be one of {header.describe()}{', named once' if count else ''}"
            )
        return header


_REMEDY = "give SMILES on lines (.smi), or a table with a header (.csv, .tsv)"


def _is_table(path: Path) -> bool:
    return kind_of(path.name).format in _TABLES


def _is_divisible(path: Path) -> bool:
    return is_divisible_table(path) if _is_table(path) else TextFile(path).is_divisible


def _of_lines(file: TextFile, piece: Slice) -> Iterator[tuple[int, str, str]]:
    """Yield place, SMILES and problem of each line; blank lines and lines that begin with `#` are left out."""
    for at, line in file.lines(piece):
        text, problem = decode(line)
        if text is None:
            yield at, "", problem
        elif (fields := text.split(maxsplit=1)) and not fields[0].startswith("#"):
            yield at, fields[0], ""
