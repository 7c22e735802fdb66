"""Genomes: windows of FASTA files, labelled by species.

A window has `length - 2` letters, so that with [BOS] and [EOS] every sample is full. Windows are cut within blocks of a
sequence, and each block belongs to one split: windows of different splits never share a letter, whatever the stride.
The remainder of a sequence after its last whole window is not used. Give one strain per species: blocks of strains that
differ in a few letters fall into different splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_prep.corpus_files import NamedSplitsConfig, kind_of, without_split
from data_prep.debian_genomes import DEBIAN, DEFAULT_PACKAGE, download_genomes
from data_prep.fasta import WHITE_SPACE, FastaSource, blocks
from data_prep.text_files import read_text_lines
from scmdm.config.fields import PathKind, key
from scmdm.data.preparation.records import Part, Record, Tally
from scmdm.errors import UserError

_KNOWN, _AMBIGUOUS = b"ACGTU", b"RYSWKMBDHVN"  # IUPAC codes; U is RNA's T
_ALPHABET = b"ACGTN"
_LARGEST_TABLE = 1 << 28  # bytes of the table of species
_COMPLEMENT = bytes.maketrans(_ALPHABET, b"TGCAN")


@dataclass
class GenomeSourceConfig(NamedSplitsConfig):
    """Keys of the source `genomes`."""

    unrecorded: ClassVar[frozenset[str]] = frozenset({"path", "species_table"})

    path: str | None = key(
        None,
        path=PathKind.INPUT,
        formerly=("path",),
        help="FASTA file, or folder of FASTA; debian:PACKAGE: genomes of a Debian package; null: four bacteria",
    )
    stride: int | None = key(
        None,
        formerly=("stride",),
        help="letters from the start of a window to the next; null: windows do not overlap",
        at_least=1,
        at_most=2**32,
    )
    block_windows: int = key(
        64,
        formerly=("block_windows",),
        help="windows per block; a block belongs to one split",
        at_least=1,
        at_most=2**32,
    )
    max_unknown: float = key(
        0.05,
        formerly=("max_unknown",),
        help="drop windows with a larger share of letters other than A, C, G, T",
        at_least=0,
        at_most=1,
    )
    soft_masked: str = key(
        "keep",
        formerly=("soft_masked",),
        help="lower case letters (repeats) become upper case (keep) or N (unknown)",
        choices=("keep", "unknown"),
    )
    reverse_complement: bool = key(
        False, formerly=("reverse_complement",), help="add the reverse complement of every window to its split"
    )
    species_from: str | None = key(
        None,
        formerly=("species_from",),
        help="label: name of the file, or of the folder directly below path; null: no labels",
        choices=("file", "folder"),
    )
    species_table: str | None = key(
        None,
        path=PathKind.INPUT,
        formerly=("species_table",),
        help="file with the labels: lines of file name or sequence id, tab, species",
    )

    def validate(self) -> None:
        packaged = self.path is None or self.path.startswith(DEBIAN)
        for name in ("species_from", "species_table"):
            if packaged and getattr(self, name) is not None:
                raise UserError(
                    f"source.{name}={getattr(self, name)!r} is not possible with source.path={self.path!r}, whose "
                    "genomes have labels; leave it out, or give files of your own"
                )
        if self.species_from is not None and self.species_table is not None:
            raise UserError(
                f"source.species_table={self.species_table!r} is not possible with source.species_from="
                f"{self.species_from!r}; give one of the two"
            )


class GenomeSource(FastaSource):
    """Windows of A, C, G, T and N of all FASTA files below a folder, or of one file, sorted by path.

    Blocks of `block_windows * (length - 2)` letters lie end to end, and windows begin every `stride` letters in them.
    IUPAC codes other than A, C, G, T and U (read as T) become N.

    Raises UserError when there are no files, or when a label is missing.
    """

    Config = GenomeSourceConfig
    tokenizers = ("dna",)
    formats = ("fasta", "fasta of nucleotides")

    def __init__(self, config: GenomeSourceConfig, length: int) -> None:
        if config.path is None or config.path.startswith(DEBIAN):
            package = (config.path or DEFAULT_PACKAGE).removeprefix(DEBIAN)
            name, path = download_genomes(package)
            super().__init__(path, name=name)
            self._species_from: str | None = "file"
        else:
            super().__init__(Path(config.path), config.split_by)
            self._species_from = config.species_from
        self._letters = length - 2
        self._stride = config.stride or self._letters
        self._per_block, self._max_unknown = config.block_windows, config.max_unknown
        self._reverse_complement = config.reverse_complement
        self._translation = _translation(config.soft_masked == "unknown")
        self._table = Path(config.species_table) if config.species_table else None
        self._species_of = read_species_table(self._table) if self._table else {}
        species = self._species_of.values() if self._table else map(self._species_of_file, self._found.files)
        self.labels = tuple(sorted({name for name in species if name is not None}))
        self._label_of = {name: index for index, name in enumerate(self.labels)}

    def files(self) -> dict[str, Path]:
        """FASTA files by path below the folder, and the table of species."""
        return self._found.files | ({self._table.name: self._table} if self._table else {})

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield windows; drop files that are damaged or not FASTA, and windows with other letters."""
        for file, identifier, lines in self._sequences(part, tally):
            where = f"{self._found.files[file]}: {identifier}"
            yield from self._windows(lines, identifier, self._label(file, identifier), where, tally)

    def _windows(
        self, lines: Iterable[bytes], identifier: str, label: int | None, where: str, tally: Tally
    ) -> Iterator[Record]:
        size = self._letters * self._per_block
        clean = (line.translate(self._translation, WHITE_SPACE) for line in lines)
        number, block = -1, b""
        for number, block in enumerate(blocks(clean, size)):
            for at in range(0, len(block) - self._letters + 1, self._stride):
                window = block[at : at + self._letters]
                tally.read()
                if self._is_usable(window, f"{where} at letter {number * size + at + 1}", tally):
                    yield from self._strands(window, label, f"{identifier}:{number}", tally)
        if number <= 0 and len(block) < self._letters:
            tally.leave_out("sequence shorter than a window")

    def _is_usable(self, window: bytes, where: str, tally: Tally) -> bool:
        foreign = window.translate(None, _ALPHABET)
        if foreign:
            tally.drop("no nucleotide", f"{where}, {chr(foreign[0])!r}")
            return False
        if window.count(b"N") > self._max_unknown * len(window):
            tally.leave_out("too many unknown letters")
            return False
        return True

    def _strands(self, window: bytes, label: int | None, group: str, tally: Tally) -> Iterator[Record]:
        yield Record(window.decode(), label, group)
        if self._reverse_complement:
            tally.read()
            yield Record(window.translate(_COMPLEMENT)[::-1].decode(), label, group)

    def _label(self, file: str, identifier: str) -> int | None:
        if self._table is None:
            species = self._species_of_file(file)
            return None if species is None else self._label_of[species]
        for name in (identifier, file, Path(file).name):
            if name in self._species_of:
                return self._label_of[self._species_of[name]]
        raise UserError(
            f"source.species_table={self._table} names neither the sequence {identifier!r} nor its file {file}; add a "
            "line"
        )

    def _species_of_file(self, file: str) -> str | None:
        if self._species_from == "file":
            return kind_of(file).stem
        parts = Path(without_split(file) if any(self._splits.values()) else file).parts
        if self._species_from == "folder" and len(parts) == 1:
            raise UserError(
                f"source.species_from=folder, but {self.path / file} is not in a folder below source.path={self.path}; "
                "make a folder for each species"
            )
        return parts[0] if self._species_from == "folder" else None


def _translation(soft_masked_unknown: bool) -> bytes:
    """Make a table for `bytes.translate` from IUPAC codes to A, C, G, T and N; other bytes stay."""
    upper = b"ACGTT" + b"N" * len(_AMBIGUOUS)
    lower = b"N" * len(upper) if soft_masked_unknown else upper
    letters = _KNOWN + _AMBIGUOUS
    return bytes.maketrans(letters + letters.lower(), upper + lower)


def read_species_table(path: Path) -> dict[str, str]:
    """Read species by file name or sequence id from lines of two columns; skip blank lines and `#` comments.

    Raises UserError for a missing file, a malformed line, and a name with two species.
    """
    lines = read_text_lines(path, f"source.species_table={path}", _LARGEST_TABLE)
    species: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 2 or not all(columns):
            raise UserError(f"{path}, line {number}: {line[:80]!r}; expected file name or sequence id, tab, species")
        if species.setdefault(columns[0], columns[1]) != columns[1]:
            raise UserError(f"{path}, line {number}: {columns[0]!r} has another species above; remove one of the two")
    if not species:
        raise UserError(f"{path} names no species; write lines of file name or sequence id, tab, species")
    return species
