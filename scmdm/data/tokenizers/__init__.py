"""From text to ids and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scmdm.data.tokenizers.base import (
    SPECIALS,
    Content,
    OwnFraming,
    Tokenizer,
    UnknownSymbol,
    as_text,
    block_text,
    is_block,
    is_framed,
    text_ids,
)
from scmdm.data.tokenizers.byte_tokenizer import ByteTokenizer
from scmdm.data.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from scmdm.data.tokenizers.level_tokenizer import KINDS as LEVEL_KINDS
from scmdm.data.tokenizers.level_tokenizer import Layout, LevelTokenizer
from scmdm.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from scmdm.data.tokenizers.symbol_tokenizer import ALPHABETS, SPLITTERS, SymbolTokenizer
from scmdm.errors import UserError

__all__ = [
    "SPECIALS",
    "ByteTokenizer",
    "Content",
    "HuggingFaceTokenizer",
    "Layout",
    "LevelTokenizer",
    "OwnFraming",
    "SentencePieceTokenizer",
    "SymbolTokenizer",
    "Tokenizer",
    "UnknownSymbol",
    "as_text",
    "block_text",
    "is_block",
    "is_framed",
    "learns_from_text",
    "load_tokenizer",
    "make_tokenizer",
    "open_tokenizer",
    "symbols_of",
    "text_ids",
    "with_model_ids",
]


def learns_from_text(kind: str) -> bool:
    """Whether `make_tokenizer` wants a sample of the training split."""
    return kind == "sentencepiece"


def symbols_of(kind: str, content: Content) -> Iterable[str]:
    """The symbols of a record that a vocabulary of this kind must have. Raises UnknownSymbol for what is none."""
    return SPLITTERS[kind](as_text(content)) if kind in SPLITTERS else ()


def make_tokenizer(
    kind: str, *, symbols: Iterable[str], sample: Iterable[str], vocab_size: int, layout: Layout | None = None
) -> Tokenizer:
    """A tokenizer of these symbols, for texts like the sample, or of values in this layout. Raises UserError."""
    if kind in LEVEL_KINDS:
        assert layout is not None
        return LevelTokenizer(kind, layout)
    if kind == "sentencepiece":
        return SentencePieceTokenizer.fit(sample, vocab_size)
    if kind == "bytes":
        return ByteTokenizer()
    return SymbolTokenizer(kind, ALPHABETS.get(kind) or sorted(symbols))


def open_tokenizer(kind: str, path: Path, *, padded: bool) -> Tokenizer:
    """A tokenizer that was made elsewhere, for a data set whose samples are `padded` or not. Raises UserError."""
    if kind == "sentencepiece":
        return SentencePieceTokenizer.open(path)
    if _is_saved(path):
        if (saved := load_tokenizer(path)).kind != kind:
            raise UserError(
                f"tokenizer_path={path} is of kind {saved.kind}; set tokenizer={saved.kind}, or another path"
            )
        return saved
    if kind in SPLITTERS:
        raise UserError(
            f"tokenizer_path={path} is no tokenizer of scmdm's; give the tokenizer.json of a model or data set"
        )
    return HuggingFaceTokenizer.open(path, padded=padded)


def with_model_ids(path: Path, rows: int, mask_id: int | None) -> Tokenizer:
    """The tokenizer of a published model whose embedding has `rows` rows, some perhaps of no token.

    `mask_id` None: its own mask, or the first id that it does not use. Raises UserError.
    """
    if path.suffix != ".model" and not _is_saved(path):
        try:
            return HuggingFaceTokenizer.open(path, padded=False, rows=rows, mask_id=mask_id)
        except UserError as error:
            raise UserError(str(error).replace("tokenizer_path=", "tokenizer=")) from error
    saved = load_tokenizer(path)
    if mask_id is not None and mask_id != saved.mask_id:
        raise UserError(
            f"tokenizer={path} has its mask at {saved.mask_id}, the model at {mask_id}; give the model's own"
        )
    return saved


def _is_saved(path: Path) -> bool:
    """Whether a file is one that a tokenizer's `save` has written as JSON."""
    try:
        return path.is_file() and isinstance(json.loads(path.read_text()).get("kind"), str)
    except (OSError, ValueError, AttributeError):
        return False


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer file; UserError when it is missing or damaged."""
    try:
        if path.suffix == ".model":
            return SentencePieceTokenizer(path.read_bytes())
        content: dict[str, Any] = json.loads(path.read_text())
        if content["kind"] in LEVEL_KINDS:
            return LevelTokenizer.parse(content)
        if content["kind"] == "bytes":
            return ByteTokenizer()
        if content["kind"] == "huggingface":
            return HuggingFaceTokenizer.from_json(content)
        return SymbolTokenizer(content["kind"], content["symbols"])
    except FileNotFoundError as error:
        raise UserError(f"tokenizer {path} is missing; prepare the data set again, or restore the directory") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # of JSON and of UTF-8 they are ValueErrors
        raise UserError(
            f"tokenizer {path} is damaged ({error}); prepare the data again, or restore the directory"
        ) from error
