"""QM9 (Ramakrishnan et al., Sci. Data 2014), from the PyPI package `qm9pack` (MIT licence)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.smiles import canonical_smiles
from data_prep.tables import read_header, read_rows
from data_prep.text_files import TextFile
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError
from scmdm.system.package_data import package_folder

_COLUMN = "SMILES"
_FILES = tuple(f"qm9_part{part}.csv" for part in (1, 2, 3))


class Qm9Source(Source):
    """Canonical SMILES (RDKit, implicit hydrogens) in the order of the files.

    The canonical form exposes duplicates, makes the split a property of the molecule rather than of its spelling, and
    is the form in which novelty compares molecules.
    """

    tokenizers = ("smiles", "selfies")
    name = "qm9"

    def __init__(self, config: SourceConfig, length: int) -> None:
        pass

    def files(self) -> dict[str, Path]:
        """The three CSV files of the installed package. Raises UserError when they are missing."""
        folder = package_folder("qm9pack", "source.name=qm9", "molecules") / "data"
        files = {name: folder / name for name in _FILES}
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path} is missing; `pip install --force-reinstall qm9pack`")
        return files

    def parts(self, part_bytes: int) -> list[Part]:
        """Whole files."""
        return cut_into_parts(self.files(), part_bytes)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield canonical SMILES; drop those that RDKit cannot parse."""
        files = self.files()
        for piece in part.slices:
            file = TextFile(files[piece.file])
            header = read_header(file, [_COLUMN])
            position = header.position(_COLUMN) if header is not None else None
            if header is None or position is None:
                raise UserError(f"{file.path} has no column {_COLUMN}; `pip install --force-reinstall qm9pack`")
            for row in read_rows(file, header, piece):
                tally.read()
                smiles = row.fields[position] if position < len(row.fields) else ""
                canonical = None if row.problem else canonical_smiles(smiles)
                if canonical is None:
                    tally.drop(row.problem or "not a molecule", f"{file.where(row.at)}: {smiles[:200]}")
                else:
                    yield Record(canonical)
            if file.problem is not None:
                tally.drop(file.problem.reason, file.problem.where)
