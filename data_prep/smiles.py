"""Molecules from the user's own files: `.smi` (SMILES, blank, name), and `.csv` or `.tsv` with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from rdkit import Chem, rdBase

from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts, read_lines
from scmdm.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".smi", *_DELIMITERS)


def canonical_smiles(smiles: str) -> str | None:
    """RDKit's canonical spelling, hydrogens implicit; None for what is no molecule, or an empty one."""
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return None if molecule is None else Chem.MolToSmiles(molecule) or None


class SmilesFiles:
    """Canonical SMILES of all such files below a folder, or of one file, sorted by path; a record is one line.

    The canonical form makes duplicates visible, makes the split a property of the molecule rather than of its spelling,
    and is what novelty is measured against.
    """

    whole_records = True
    labels: tuple[str, ...] = ()
    published: tuple[str, ...] = ()

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column, self.name = path, column, path.name

    def files(self) -> dict[str, Path]:
        """By path below the folder. Raises UserError when the path does not exist or holds no such file."""
        if self.path.is_file():
            return {self.path.name: self.path}
        if not self.path.is_dir():
            raise UserError(f"path={self.path} does not exist; give a .smi, .csv or .tsv file or a folder of them")
        files = sorted(path for path in self.path.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        if not files:
            raise UserError(f"path={self.path} holds no .smi, .csv or .tsv file; give a folder that does")
        return {str(path.relative_to(self.path)): path for path in files}

    def parts(self, part_bytes: int) -> list[Part]:
        """Small files together, large ones in ranges of lines. Raises UserError for a table without the column."""
        files = self.files()
        for path in files.values():
            self._position(path)
        return cut_into_parts(files, part_bytes, divisible=lambda _: True)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Canonical SMILES; what RDKit cannot read is left out."""
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
        """What should be SMILES, with its offset; None where a line ends before the column."""
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
                f"smiles_column={self.column} is not in the header of {path} ({', '.join(header)}); give one that is"
            )
        return header.index(self.column)


def _fields(line: str, delimiter: str | None) -> list[str]:
    """None of a line that csv refuses, such as one with a field of more than 131,072 characters."""
    if delimiter is None:
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []
