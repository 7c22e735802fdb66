"""Tokenizers whose vocabulary is the list of symbols that a corpus has.

Ids 0 to 3 are padding, beginning, end and mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scmdm.data.tokenizers.base import SPECIALS, Content, UnknownSymbol, as_text, text_ids
from scmdm.system.files import atomic_write_text

# Atom-level SMILES pieces (Schwaller et al., ACS Cent. Sci. 2019): bracket atoms, two-letter elements, bonds, rings.
SMILES_PIECES = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOSPFIbcnosp]|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%\d\d|\d")

NUCLEOTIDES = "ACGTN"  # N: not known which
_NO_NUCLEOTIDE = str.maketrans("", "", NUCLEOTIDES)


class SymbolTokenizer:
    """A list of symbols behind the specials; the splitter of its kind cuts a text into them."""

    pad_id, bos_id, eos_id, mask_id = range(4)

    def __init__(self, kind: str, symbols: Sequence[str]) -> None:
        self.kind = kind
        self.symbols = [*SPECIALS, *symbols]
        self.vocab_size = len(self.symbols)
        self._ids = {symbol: index for index, symbol in enumerate(self.symbols)}

    def encode(self, content: Content) -> list[int]:
        try:
            return [self._ids[symbol] for symbol in SPLITTERS[self.kind](as_text(content))]
        except KeyError as error:
            raise UnknownSymbol(f"unknown symbol {error.args[0]!r}") from None

    def decode(self, ids: Sequence[int]) -> str:
        text = "".join(self.symbols[i] for i in text_ids(ids, self))
        return selfies_to_smiles(text) if self.kind == "selfies" else text

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.symbols[i] for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        content = {"kind": self.kind, "symbols": self.symbols[len(SPECIALS) :]}
        atomic_write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        return path


def split_smiles(text: str) -> list[str]:
    """Atom-level pieces. Raises UnknownSymbol for what is not SMILES."""
    pieces = SMILES_PIECES.findall(text)
    if sum(map(len, pieces)) != len(text):
        rest = SMILES_PIECES.sub("", text)
        raise UnknownSymbol(f"{rest[:1]!r} in {text!r} is not SMILES")
    return pieces


def split_selfies(smiles: str) -> list[str]:
    """The symbols of a molecule's SELFIES (Krenn et al., Mach. Learn.: Sci. Technol. 2020).

    Raises UnknownSymbol for SMILES that SELFIES cannot say: atoms beyond its valences, wildcards.
    """
    import selfies

    try:
        return list(selfies.split_selfies(selfies.encoder(smiles)))
    except selfies.EncoderError as error:
        raise UnknownSymbol(f"{smiles!r} has no SELFIES: {str(error).strip().splitlines()[0]}") from None


def selfies_to_smiles(symbols: str) -> str:
    """The SMILES of a SELFIES, canonical as the data is (RDKit); as SELFIES writes it where RDKit cannot read that."""
    import selfies
    from rdkit import Chem, rdBase

    smiles = selfies.decoder(symbols)
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return smiles if molecule is None else Chem.MolToSmiles(molecule)


def split_dna(text: str) -> list[str]:
    """Letters. Raises UnknownSymbol for what is none of A, C, G, T and N (unknown), lower case included."""
    rest = text.translate(_NO_NUCLEOTIDE)
    if rest:
        raise UnknownSymbol(f"{rest[:1]!r} is none of {', '.join(NUCLEOTIDES)}")
    return list(text)


SPLITTERS: Mapping[str, Callable[[str], list[str]]] = {
    "smiles": split_smiles,
    "selfies": split_selfies,
    "characters": list,
    "dna": split_dna,
}
# Alphabets that are the same for every corpus; those of other kinds are the symbols that the corpus has.
ALPHABETS: Mapping[str, str] = {"dna": NUCLEOTIDES}
