"""QM9 (Ramakrishnan et al., Sci. Data 2014) as shipped, under the MIT licence, in the PyPI package `qm9pack`."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from data_prep.smiles import canonical_smiles
from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts
from scmdm.errors import UserError

_FILES = tuple(f"qm9_part{part}.csv" for part in (1, 2, 3))


class Qm9:
    """Canonical SMILES (RDKit, hydrogens implicit, one spelling per molecule), in the order of the files.

    The canonical form makes duplicates visible, makes the split a property of the molecule rather than of its spelling,
    and is what novelty is measured against.
    """

    name = "qm9"
    whole_records = True
    labels: tuple[str, ...] = ()
    published: tuple[str, ...] = ()

    def files(self) -> dict[str, Path]:
        """The three CSV files of the installed package; UserError when it is not installed."""
        spec = importlib.util.find_spec("qm9pack")
        if spec is None or not spec.submodule_search_locations:
            raise UserError("source=qm9 needs the package qm9pack; `pip install qm9pack`")
        folder = Path(next(iter(spec.submodule_search_locations))) / "data"
        files = {name: folder / name for name in _FILES}
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path} is missing; `pip install --force-reinstall qm9pack`")
        return files

    def parts(self, part_bytes: int) -> list[Part]:
        """Whole files."""
        return cut_into_parts(self.files(), part_bytes)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Canonical SMILES; what RDKit cannot read is left out."""
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
