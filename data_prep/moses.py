"""MOSES (Polykovskiy et al., Front. Pharmacol. 2020), as shipped, under the MIT licence, in the PyPI wheel `molsets`.

The wheel pins requirements that can no longer be installed: only its data files are read.
"""

from __future__ import annotations

import gzip
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts, read_lines
from scmdm.errors import UserError
from scmdm.system.package_data import package_data

FILTER_FILES = ("mcf.csv", "wehi_pains.csv")  # SMARTS of unwanted groups, for the metrics
_REQUIREMENT = "molsets==0.3.1"
_HEADER = b"SMILES"


class Moses:
    """Molecules in the published splits, as they are published.

    These are canonical SMILES of the RDKit of 2020; today's RDKit spells about one in four thousand differently. They
    stay as they are, because MOSES measures novelty against these strings. Validation, which is not published, is taken
    out of the training set by hash.
    """

    name = "moses"
    whole_records = True
    labels: tuple[str, ...] = ()
    published: tuple[str, ...] = ("train", "test", "test_scaffolds")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> dict[str, Path]:
        """`SPLIT.csv` of each published split. Raises UserError when one is missing."""
        files = {f"{split}.csv": self.folder / f"{split}.csv" for split in self.published}
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path} is missing; remove {self.folder}, and it will be fetched again")
        return files

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of lines, each of one split."""
        return [
            part
            for split, (name, path) in zip(self.published, self.files().items(), strict=True)
            for part in cut_into_parts({name: path}, part_bytes, lambda _: True, split)
        ]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """One for every line but the header."""
        files = self.files()
        for piece in part.slices:
            for at, line in read_lines(files[piece.file], piece):
                smiles = line.strip()
                if smiles and (at, smiles) != (0, _HEADER):
                    tally.read()
                    yield Record(smiles.decode())


def moses_folder() -> Path:
    """Splits and filters, fetched once with pip into the user's cache; UserError when pip cannot."""
    return package_data(_REQUIREMENT, _unpack, remedy="give SMILES files with source=smiles path=... instead")


def read_smiles(split: str) -> list[str]:
    """A published split, in its order."""
    return (moses_folder() / f"{split}.csv").read_text().split()[1:]


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for split in Moses.published:
            packed = archive.open(f"moses/dataset/data/{split}.csv.gz")
            with packed, gzip.open(packed) as source, open(folder / f"{split}.csv", "wb") as target:
                shutil.copyfileobj(source, target)
        for name in FILTER_FILES:
            (folder / name).write_bytes(archive.read(f"moses/metrics/{name}"))
