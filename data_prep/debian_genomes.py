"""Genomes from Debian's example packages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.debian_packages import copy_file, unpacked_package
from scmdm.errors import UserError
from scmdm.system.package_data import cached_folder

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

    def make(folder: Path) -> None:
        with unpacked_package(package, _INSTEAD) as unpacked:
            for species, file in wanted.files.items():
                copy_file(package, unpacked / wanted.folder / file, folder / f"{species}.fasta.gz", _INSTEAD)

    return wanted.name, cached_folder(wanted.name, make)
