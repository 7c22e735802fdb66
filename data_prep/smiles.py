"""Molecules in the user's files: `.smi` (SMILES, blank, name), and `.csv` or `.tsv` with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts, read_lines
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError
from scmdm.system.package_data import optional

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".smi", *_DELIMITERS)


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
class SmilesSourceConfig(SourceConfig):
    """Keys of the source `smiles`."""

    path: str = key(
        MISSING, path=PathKind.INPUT, formerly=("path",), help=".smi, .csv or .tsv file, or a folder of them"
    )
    column: str = key("SMILES", formerly=("smiles_column",), help="column with SMILES in .csv and .tsv files")


class SmilesSource(Source):
    """Canonical SMILES of a file, or of all files below a folder, sorted by path; a record is one line.

    See `Qm9Source` for the reasons for the canonical form.
    """

    Config = SmilesSourceConfig
    tokenizers = ("smiles", "selfies")

    def __init__(self, config: SmilesSourceConfig, length: int) -> None:
        self.path, self.column = Path(config.path), config.column
        self.name = self.path.name

    def files(self) -> dict[str, Path]:
        """Files by path below the folder. Raises UserError when there are none."""
        if self.path.is_file():
            return {self.path.name: self.path}
        if not self.path.is_dir():
            raise UserError(
                f"source.path={self.path} does not exist; give a .smi, .csv or .tsv file or a folder of them"
            )
        files = sorted(path for path in self.path.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        if not files:
            raise UserError(f"source.path={self.path} holds no .smi, .csv or .tsv file; give a folder that does")
        return {str(path.relative_to(self.path)): path for path in files}

    def parts(self, part_bytes: int) -> list[Part]:
        """Group small files, and divide large ones into lines. Raises UserError for a table without the column."""
        files = self.files()
        for path in files.values():
            self._position(path)
        return cut_into_parts(files, part_bytes, divisible=lambda _: True)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield canonical SMILES; drop those that RDKit cannot parse."""
        files = self.files()
        for piece in part.slices:
            path = files[piece.file]
            for at, smiles in self._spellings(path, piece):
                tally.read()
                canonical = None if smiles is None else canonical_smiles(smiles)
                if canonical is None:
                    tally.drop("not a molecule", f"{path} at byte {at}: {smiles}")
                else:
                    yield Record(canonical)

    def _spellings(self, path: Path, piece: Slice) -> Iterator[tuple[int, str | None]]:
        """Yield offset and SMILES of each line; None where a line ends before the column."""
        position, delimiter = self._position(path), _DELIMITERS.get(path.suffix)
        for at, line in read_lines(path, piece):
            text = line.decode(errors="replace").strip("\r\n")
            if not text.strip() or (at == 0 and delimiter):
                continue
            fields = _fields(text, delimiter)
            yield at, fields[position].strip() if position < len(fields) else None

    def _position(self, path: Path) -> int:
        if path.suffix not in _DELIMITERS:
            return 0
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            header = next(csv.reader([file.readline().strip("\r\n")], delimiter=_DELIMITERS[path.suffix]), [])
        if self.column not in header:
            raise UserError(
                f"source.column={self.column} is not in the header of {path}; it must be one of {', '.join(header)}"
            )
        return header.index(self.column)


def _fields(line: str, delimiter: str | None) -> list[str]:
    """Split a line; returns no fields if `csv` rejects it, such as for a field of over 131,072 characters."""
    if delimiter is None:
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []
