"""MOSES (Polykovskiy et al., Front. Pharmacol. 2020), from the PyPI wheel `molsets` (MIT licence).

The wheel pins requirements that can no longer be installed, so only its data files are read.
"""

from __future__ import annotations

import gzip
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.text_files import TextFile, decode
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts
from scmdm.data.preparation.source import Source
from scmdm.errors import UserError
from scmdm.system.package_data import package_data
from scmdm.system.untrusted import reading

PUBLISHED_SPLITS = ("train", "test", "test_scaffolds")
FILTER_FILES = ("mcf.csv", "wehi_pains.csv")  # SMARTS of unwanted groups, for the metrics
_REQUIREMENT = "molsets==0.3.1"
_HEADER = "SMILES"


class MosesSource(Source):
    """Molecules in the published splits and spelling.

    The SMILES are canonical for the RDKit of 2020; current versions spell about one in four thousand differently. They
    are kept because MOSES measures novelty against these strings. There is no published validation set: a hash takes it
    out of the training set.
    """

    tokenizers = ("smiles", "selfies")
    name = "moses"

    def __init__(self, config: SourceConfig, length: int) -> None:
        self.folder = moses_folder()

    @property
    def published(self) -> tuple[str, ...]:
        return PUBLISHED_SPLITS

    def files(self) -> dict[str, Path]:
        """`SPLIT.csv` of each published split. Raises UserError when one is missing."""
        files = {f"{split}.csv": self.folder / f"{split}.csv" for split in PUBLISHED_SPLITS}
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path} is missing; remove {self.folder} to download it again")
        return files

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of lines, each of one split."""
        return [
            part
            for split, (name, path) in zip(PUBLISHED_SPLITS, self.files().items(), strict=True)
            for part in cut_into_parts({name: path}, part_bytes, lambda _: True, split)
        ]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """One record per line, without the header."""
        files = self.files()
        for piece in part.slices:
            file = TextFile(files[piece.file])
            for at, line in file.lines(piece):
                text, problem = decode(line)
                smiles = (text or "").strip()
                if (at, smiles) == (0, _HEADER) or (text is not None and not smiles):
                    continue
                tally.read()
                if text is None:
                    tally.drop(problem, file.where(at))
                else:
                    yield Record(smiles)
            if file.problem is not None:
                tally.drop(file.problem.reason, file.problem.where)


def moses_folder() -> Path:
    """Folder of the splits and filters, downloaded with pip once. Raises UserError when pip fails."""
    return package_data(_REQUIREMENT, _unpack, remedy="give SMILES files with source.name=smiles source.path=...")


def read_smiles(split: str) -> list[str]:
    """Read the SMILES of a published split, in order."""
    path = moses_folder() / f"{split}.csv"
    with reading(path, "file of MOSES", f"remove {path.parent} to download it again"):
        return path.read_text(encoding="utf-8").split()[1:]


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for split in PUBLISHED_SPLITS:
            packed = archive.open(f"moses/dataset/data/{split}.csv.gz")
            with packed, gzip.open(packed) as source, open(folder / f"{split}.csv", "wb") as target:
                shutil.copyfileobj(source, target)
        for name in FILTER_FILES:
            (folder / name).write_bytes(archive.read(f"moses/metrics/{name}"))
