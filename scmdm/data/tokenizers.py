"""From text to ids and back: atom-level SMILES, characters, sentencepiece.

Ids 0 to 3 are padding, beginning, end and mask in every tokenizer fitted here.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from scmdm.errors import UserError
from scmdm.files import atomic_write_bytes, atomic_write_text

SPECIALS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]")
# Atom-level SMILES pieces (Schwaller et al., ACS Cent. Sci. 2019): bracket atoms, two-letter elements, bonds, rings.
SMILES_PIECES = re.compile(r"\[[^\]]+\]|Br|Cl|[BCNOSPFIbcnosp]|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%\d\d|\d")


class UnknownSymbol(ValueError):
    """A symbol that the vocabulary does not have."""


class Tokenizer(Protocol):
    """Ids below `vocab_size`, specials and mask included."""

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials. Raises UnknownSymbol."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first end mark, without specials."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """A readable piece for every id."""
        ...

    def save(self, directory: Path) -> Path:
        """Write one file into `directory` and return its path."""
        ...


class SymbolTokenizer:
    """A list of symbols behind the specials; `split` cuts a text into them. Kinds "smiles" and "characters"."""

    pad_id, bos_id, eos_id, mask_id = range(4)

    def __init__(self, kind: str, symbols: Sequence[str]) -> None:
        self.kind = kind
        self.symbols = [*SPECIALS, *symbols]
        self.vocab_size = len(self.symbols)
        self._ids = {symbol: index for index, symbol in enumerate(self.symbols)}

    @classmethod
    def fit(cls, kind: str, corpus: Iterable[str]) -> SymbolTokenizer:
        """The sorted symbols of a corpus."""
        symbols: set[str] = set()
        for text in corpus:
            symbols.update(split_symbols(kind, text))
        return cls(kind, sorted(symbols))

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[symbol] for symbol in split_symbols(self.kind, text)]
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


def split_symbols(kind: str, text: str) -> list[str]:
    """Symbols of a text. Raises UnknownSymbol for what is not SMILES."""
    if kind == "characters":
        return list(text)
    pieces = SMILES_PIECES.findall(text)
    if sum(map(len, pieces)) != len(text):
        rest = SMILES_PIECES.sub("", text)
        raise UnknownSymbol(f"{rest[:1]!r} in {text!r} is not SMILES")
    return pieces


class SentencePieceTokenizer:
    """A sentencepiece model with our specials among its pieces."""

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = (self._processor.piece_to_id(s) for s in SPECIALS)

    @classmethod
    def fit(cls, corpus: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
        """Train a unigram model with byte fallback: every text has an encoding and decodes to itself."""
        buffer = io.BytesIO()
        pad, bos, eos, mask = SPECIALS
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus),
                model_writer=buffer,
                vocab_size=vocab_size,
                model_type="unigram",
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 20,
                num_threads=1,
                pad_id=0,
                pad_piece=pad,
                bos_id=1,
                bos_piece=bos,
                eos_id=2,
                eos_piece=eos,
                unk_id=4,
                control_symbols=[mask],
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"vocab_size={vocab_size} does not fit this corpus: {reason}; choose another vocab_size"
            ) from error
        return cls(buffer.getvalue())

    def encode(self, text: str) -> list[int]:
        # A newline is not a piece of its own in sentencepiece's trainer; byte fallback carries it through.
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([i for i in text_ids(ids, self) if i < self.vocab_size])

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.model"
        atomic_write_bytes(path, self._model)
        return path


def text_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The ids of the text itself: up to the first end mark, without padding, beginning and mask."""
    ids = list(ids)
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return [i for i in ids if i not in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id)]


def is_framed(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether ids look as the data does: one beginning, first; at most one end; padding behind it and nowhere else."""
    ids = list(ids)
    end = ids.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in ids else len(ids)
    text, rest = ids[1:end], ids[end:]
    marks = (tokenizer.bos_id, tokenizer.pad_id, tokenizer.mask_id)
    return ids[:1] == [tokenizer.bos_id] and not any(i in marks for i in text) and set(rest) <= {tokenizer.pad_id}


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer file; UserError when it is missing or damaged."""
    try:
        if path.suffix == ".model":
            return SentencePieceTokenizer(path.read_bytes())
        content: dict[str, Any] = json.loads(path.read_text())
        return SymbolTokenizer(content["kind"], content["symbols"])
    except FileNotFoundError as error:
        raise UserError(f"tokenizer {path} is missing; prepare the data set again, or restore the directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"tokenizer {path} is damaged ({error}); prepare the data again, or restore the directory"
        ) from error
