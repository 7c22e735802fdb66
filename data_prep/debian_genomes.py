"""Genomes from Debian's example packages, downloaded once with apt-get and unpacked, but not installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scmdm.errors import UserError
from scmdm.system.files import atomic_directory
from scmdm.system.package_data import user_cache

DEBIAN = "debian:"  # prefix of `source.path`
DEFAULT_PACKAGE = "ragout-examples"
_INSTEAD = "give a folder of FASTA as source.path=..."


@dataclass(frozen=True)
class _Package:
    """Gzipped FASTA files of a package, by species."""

    name: str  # name of the corpus
    folder: str
    files: dict[str, str]


# Complete genomes without unknown letters.
_PACKAGES = {
    # One strain per species: MG1655, G27, COL, O395.
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
    # Two strains of one species and four of another. Most windows occur in several strains, hence in several splits.
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


def download_genomes(package: str) -> tuple[str, Path]:
    """Download genomes into the user's cache once; returns the corpus name and a folder of `SPECIES.fasta.gz` files.

    Raises UserError for an unknown package, and when apt-get cannot download it.
    """
    if package not in _PACKAGES:
        raise UserError(
            f"source.path={DEBIAN}{package} is not possible; it must be {DEBIAN} and one of {', '.join(_PACKAGES)}"
        )
    wanted = _PACKAGES[package]
    cache = user_cache(wanted.name)
    if not cache.is_dir():
        with tempfile.TemporaryDirectory() as place, atomic_directory(cache) as folder:
            examples = _unpack(package, Path(place)) / wanted.folder
            for species, file in wanted.files.items():
                if not (examples / file).is_file():
                    raise UserError(f"this system's {package} has no {file}; {_INSTEAD}")
                shutil.copyfile(examples / file, folder / f"{species}.fasta.gz")
    return wanted.name, cache


def _unpack(package: str, place: Path) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(f"{package} is downloaded with Debian's apt-get, which is not installed; {_INSTEAD}")
    _run(["apt-get", "download", package], place, f"run `apt-get update`, or {_INSTEAD}")
    _run(["dpkg-deb", "--extract", next(place.glob("*.deb")).name, "unpacked"], place, _INSTEAD)
    return place / "unpacked"


def _run(command: list[str], place: Path, remedy: str) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"`{' '.join(command)}` failed: {reason}; {remedy}")
