"""Proteins: sequences of amino acids in FASTA files.

The alphabet is the 20 standard amino acids and X (unknown). The codes B, J and Z (either of two amino acids), U
(selenocysteine) and O (pyrrolysine) become X, because they are too rare to be learned. A final `*` (stop) is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from data_prep.corpus_files import NamedSplitsConfig
from data_prep.fasta import WHITE_SPACE, FastaSource
from scmdm.config.fields import PathKind, key
from scmdm.data.preparation.records import Part, Record, Tally
from scmdm.data.tokenizers.symbol_tokenizer import AMINO_ACIDS

_LETTERS = AMINO_ACIDS.encode()
_CODES = _LETTERS + b"BJZUO"
_TRANSLATION = bytes.maketrans(_CODES + _CODES.lower(), (_LETTERS + b"X" * 5) * 2)


@dataclass
class ProteinSourceConfig(NamedSplitsConfig):
    """Keys of the source `proteins`."""

    path: str = key(
        MISSING, path=PathKind.INPUT, help="FASTA file, or folder of .fa, .fasta and .faa files, compressed or not"
    )
    on_length: str = key(
        "windows",
        help="sequences of more than length - 2 amino acids are cut into windows (of one split), or dropped",
        choices=("windows", "drop"),
    )
    max_unknown: float = key(0.05, help="drop sequences with a larger share of X", at_least=0, at_most=1)


class ProteinSource(FastaSource):
    """Sequences of all FASTA files below a folder, or of one file, sorted by path, in upper case."""

    Config = ProteinSourceConfig
    tokenizers = ("amino_acids",)
    formats = ("fasta", "fasta of amino acids")

    def __init__(self, config: ProteinSourceConfig, length: int) -> None:
        super().__init__(Path(config.path), config.split_by)
        self._longest, self._drops_long, self._max_unknown = length - 2, config.on_length == "drop", config.max_unknown

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield sequences or windows; drop files that are damaged or not FASTA, and sequences with other letters."""
        for file, identifier, lines in self._sequences(part, tally):
            sequence = b"".join(line.translate(_TRANSLATION, WHITE_SPACE) for line in lines).removesuffix(b"*")
            tally.read()
            foreign = sequence.translate(None, _LETTERS)
            if foreign or not sequence:
                found = repr(chr(foreign[0])) if foreign else "no letters"
                tally.drop("no amino acid", f"{self._found.files[file]}: {identifier}, {found}")
            elif sequence.count(b"X") > self._max_unknown * len(sequence):
                tally.leave_out("too many unknown letters")
            elif len(sequence) <= self._longest:
                yield Record(sequence.decode())
            elif self._drops_long:
                tally.leave_out("longer than a sample")
            else:
                yield from self._windows(sequence, tally)

    def _windows(self, sequence: bytes, tally: Tally) -> Iterator[Record]:
        group = hashlib.sha256(sequence).hexdigest()
        for at in range(0, len(sequence), self._longest):
            if at > 0:
                tally.read()
            yield Record(sequence[at : at + self._longest].decode(), group=group)
