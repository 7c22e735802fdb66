"""QM9 (Ramakrishnan et al., Sci. Data 2014), from the PyPI package `qm9pack` (MIT licence)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from data_prep.smiles import canonical_smiles
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError
from scmdm.system.package_data import package_folder

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
            with open(files[piece.file], newline="") as file:
                for row in csv.DictReader(file):
                    tally.read()
                    canonical = canonical_smiles(row["SMILES"])
                    if canonical is None:
                        tally.drop("not a molecule", f"{files[piece.file]}: {row['SMILES']}")
                    else:
                        yield Record(canonical)
