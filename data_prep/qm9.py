"""QM9 (Ramakrishnan et al., Sci. Data 2014) as shipped, under the MIT licence, in the PyPI package `qm9pack`."""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rdkit import Chem, rdBase

from scmdm.errors import UserError

_FILES = tuple(f"qm9_part{part}.csv" for part in (1, 2, 3))


class Qm9:
    """Canonical SMILES (RDKit, hydrogens implicit, one spelling per molecule), in the order of the files.

    The canonical form makes duplicates visible, makes the split a property of the molecule rather than of its spelling,
    and is what novelty is measured against.
    """

    name = "qm9"
    whole_records = True

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

    def records(self, counts: Counter[str], on_record: Callable[[], None]) -> Iterator[str]:
        """Each molecule once; what RDKit cannot read, and repetitions, are counted."""
        seen: set[str] = set()
        with rdBase.BlockLogs():
            for smiles in self._raw():
                counts["read"] += 1
                on_record()
                molecule = Chem.MolFromSmiles(smiles)
                canonical = None if molecule is None else Chem.MolToSmiles(molecule)
                if not canonical:
                    counts["dropped: not a molecule"] += 1
                elif canonical in seen:
                    counts["dropped: duplicate"] += 1
                else:
                    seen.add(canonical)
                    yield canonical

    def _raw(self) -> Iterator[str]:
        for path in self.files().values():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    yield row["SMILES"]
