"""Real genomes that Debian's packages of examples carry: fetched once with apt-get, unpacked, never installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_prep.genomes import Genomes, Labels, Windows
from scmdm.config.preparation import DEBIAN
from scmdm.errors import UserError
from scmdm.system.files import atomic_directory
from scmdm.system.package_data import user_cache

DEFAULT = "ragout-examples"


@dataclass(frozen=True)
class _Package:
    """What of a package is taken: gzipped FASTA, by the species (or strains) that it is of."""

    name: str  # of the corpus
    folder: str
    files: dict[str, str]


# Complete genomes without unknown letters.
_PACKAGES = {
    # One strain of each species: MG1655, G27, COL, O395.
    "ragout-examples": _Package(
        "bacteria",
        "usr/share/doc/ragout/examples",
        {
            "Escherichia_coli": "E.Coli/references/MG1655-K12.fasta.gz",
            "Helicobacter_pylori": "H.Pylori/references/G27.fasta.gz",
            "Staphylococcus_aureus": "S.Aureus/references/COL.fasta.gz",
            "Vibrio_cholerae": "V.Cholerae/references/O395.fasta.gz",
        },
    ),
    # Two strains of one species and four of another: most of a window is in several strains, hence in several splits.
    "sibelia-examples": _Package(
        "strains",
        "usr/share/doc/sibelia/examples",
        {
            "Helicobacter_pylori": "Sibelia/Helicobacter_pylori/Helicobacter_pylori.fasta.gz",
            "Staphylococcus_aureus": "Sibelia/Staphylococcus_aureus/Staphylococcus.fasta.gz",
        },
    ),
    # Phage lambda, 48,502 letters.
    "bowtie2-examples": _Package(
        "lambda", "usr/share/doc/bowtie2/examples", {"Lambda": "reference/lambda_virus.fa.gz"}
    ),
}


def debian_genomes(package: str, windows: Windows) -> Genomes:
    """Windows of a package's genomes, with their species as labels, out of the user's cache.

    Raises UserError for a package that is not known, and when apt-get cannot fetch it.
    """
    if package not in _PACKAGES:
        raise UserError(
            f"path={DEBIAN}{package} is not possible; it must be {DEBIAN} and one of {', '.join(_PACKAGES)}"
        )
    wanted = _PACKAGES[package]
    cache = user_cache(wanted.name)
    if not cache.is_dir():
        with tempfile.TemporaryDirectory() as place, atomic_directory(cache) as folder:
            examples = _unpack(package, Path(place)) / wanted.folder
            for species, file in wanted.files.items():
                if not (examples / file).is_file():
                    raise UserError(f"{package} of this system holds no {file}; give a folder of FASTA as path=...")
                shutil.copyfile(examples / file, folder / f"{species}.fasta.gz")
    return Genomes(cache, windows, Labels(by="file"), name=wanted.name)


def _unpack(package: str, place: Path) -> Path:
    instead = "give a folder of FASTA as path=... instead"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(f"{package} is fetched with Debian's apt-get, which is not installed; {instead}")
    _run(["apt-get", "download", package], place, f"is {package} known after `apt-get update`? Or {instead}")
    _run(["dpkg-deb", "--extract", next(place.glob("*.deb")).name, "unpacked"], place, instead)
    return place / "unpacked"


def _run(command: list[str], place: Path, remedy: str) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"`{' '.join(command)}` failed: {reason}; {remedy}")
