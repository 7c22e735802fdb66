"""Tokenizers whose vocabulary is a list of symbols: characters, pieces of SMILES or SELFIES, letters of sequences.

Ids 0 to 3 are [PAD], [BOS], [EOS] and [MASK].
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import TokenizerConfig
from scmdm.data.tokenizers.base import (
    SPECIALS,
    Content,
    GridLayout,
    ReservedSymbol,
    Tokenizer,
    UnknownSymbol,
    as_text,
    text_ids,
)
from scmdm.data.tokenizers.tokenizer_file import open_tokenizer_file
from scmdm.system.files import atomic_write_text
from scmdm.system.package_data import optional
from scmdm.system.untrusted import describe, parse_as

# Atom-level SMILES pieces (Schwaller et al., ACS Cent. Sci. 2019): bracket atoms, two-letter elements, bonds, rings.
SMILES_PIECES = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOSPFIbcnosp]|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%\d\d|\d")

_SPECIALS = frozenset(SPECIALS)

NUCLEOTIDES = "ACGTN"  # N: unknown
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYX"  # X: unknown


@dataclass(frozen=True)
class _SymbolFile:
    kind: str
    symbols: list[str]


class SymbolTokenizer(Tokenizer):
    """Base of tokenizers that split a text into symbols and have an id for each."""

    pad_id, bos_id, eos_id, mask_id = range(4)

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = [*SPECIALS, *symbols]
        self.vocab_size = len(self.symbols)
        self._ids = {symbol: index for index, symbol in enumerate(self.symbols)}

    @classmethod
    @abstractmethod
    def split(cls, text: str) -> list[str]:
        """Split a text into symbols. Raises UnknownSymbol where that is impossible."""

    @classmethod
    def parse(cls, content: dict[str, Any], path: Path) -> Self:
        symbols = parse_as(_SymbolFile, content, path).symbols
        known = set(SPECIALS)
        for at, symbol in enumerate(symbols):
            if not symbol or symbol in known:
                raise ValueError(f"symbols.{at}={symbol!r} is empty, a duplicate or a special")
            known.add(symbol)
        return cls(symbols)

    @classmethod
    def symbols_of(cls, content: Content) -> Iterable[str]:
        symbols = cls.split(as_text(content))
        if not _SPECIALS.isdisjoint(symbols):  # such as an atom in brackets
            raise ReservedSymbol(f"{sorted(_SPECIALS.intersection(symbols))[0]!r} is reserved")
        return symbols

    def _ids_of(self, content: Content) -> list[int]:
        try:
            return [self._ids[symbol] for symbol in self.split(as_text(content))]
        except KeyError as error:
            raise UnknownSymbol(f"unknown symbol {error.args[0]!r}") from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[i] for i in text_ids(ids, self))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.symbols[i] for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        content = {"kind": self.kind, "symbols": self.symbols[len(SPECIALS) :]}
        atomic_write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        return path


@dataclass
class CorpusSymbolsConfig(TokenizerConfig):
    """Keys of tokenizers whose vocabulary is the set of symbols of the corpus."""

    path: str | None = key(
        None,
        path=PathKind.INPUT,
        formerly=("tokenizer_path",),
        help="tokenizer.json of a model or a data set, for its vocabulary; null: the symbols of the corpus",
    )


class _CorpusSymbols(SymbolTokenizer):
    Config = CorpusSymbolsConfig

    @classmethod
    def open(cls, config: CorpusSymbolsConfig, *, padded: bool) -> Self | None:
        if config.path is None:
            return None
        opened = open_tokenizer_file(Path(config.path), cls.kind)
        assert isinstance(opened, cls)
        return opened

    @classmethod
    def build(cls, config: Any, *, symbols: Iterable[str], sample: Iterable[str], layout: GridLayout | None) -> Self:
        return cls(sorted(symbols))


class _FixedAlphabet(SymbolTokenizer):
    alphabet: ClassVar[str]

    @classmethod
    def build(cls, config: Any, *, symbols: Iterable[str], sample: Iterable[str], layout: GridLayout | None) -> Self:
        return cls(cls.alphabet)

    @classmethod
    def split(cls, text: str) -> list[str]:
        """Split a text into letters. Raises UnknownSymbol for others than the alphabet's, lower case included."""
        rest = text.translate(str.maketrans("", "", cls.alphabet))
        if rest:
            raise UnknownSymbol(f"{rest[:1]!r} is not one of {', '.join(cls.alphabet)}")
        return list(text)


class CharacterTokenizer(_CorpusSymbols):
    """Tokenizer of Unicode characters."""

    kind = "characters"

    @classmethod
    def split(cls, text: str) -> list[str]:
        return list(text)


class SmilesTokenizer(_CorpusSymbols):
    """Tokenizer of atom-level SMILES pieces."""

    kind = "smiles"

    @classmethod
    def split(cls, text: str) -> list[str]:
        """Split a text into atom-level pieces. Raises UnknownSymbol for a text that is not SMILES."""
        pieces = SMILES_PIECES.findall(text)
        if sum(map(len, pieces)) != len(text):
            rest = SMILES_PIECES.sub("", text)
            raise UnknownSymbol(f"{rest[:1]!r} in {text[:80]!r} is not SMILES")
        return pieces


class SelfiesTokenizer(_CorpusSymbols):
    """Tokenizer of SELFIES symbols (Krenn et al., Mach. Learn.: Sci. Technol. 2020). Encodes and decodes SMILES."""

    kind = "selfies"

    @classmethod
    def split(cls, text: str) -> list[str]:
        """Return the SELFIES symbols of a SMILES string.

        Raises UnknownSymbol for SMILES that SELFIES cannot represent, such as wildcards.
        """
        selfies = optional("selfies", "tokenizer.name=selfies", "molecules")
        try:
            return list(selfies.split_selfies(selfies.encoder(text)))
        except Exception as error:  # EncoderError, and others for what its parser does not expect
            raise UnknownSymbol(f"{text[:80]!r} has no SELFIES: {describe(error)}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Return canonical SMILES, as in the data, or the SMILES of SELFIES where RDKit cannot parse it."""
        selfies = optional("selfies", "tokenizer.name=selfies", "molecules")
        chem, base = (optional(name, "tokenizer.name=selfies", "molecules") for name in ("rdkit.Chem", "rdkit.rdBase"))
        smiles: str = selfies.decoder(super().decode(ids))
        with base.BlockLogs():
            molecule = chem.MolFromSmiles(smiles)
        return smiles if molecule is None else chem.MolToSmiles(molecule)


class DnaTokenizer(_FixedAlphabet):
    """Tokenizer of nucleotides A, C, G, T and N (unknown)."""

    kind = "dna"
    alphabet = NUCLEOTIDES


class AminoAcidTokenizer(_FixedAlphabet):
    """Tokenizer of the 20 standard amino acids and X (unknown)."""

    kind = "amino_acids"
    alphabet = AMINO_ACIDS
