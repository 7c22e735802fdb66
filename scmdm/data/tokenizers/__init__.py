"""Tokenizers: conversion between the content of records and token ids.

`scmdm.config.preparation.TOKENIZERS` lists them by name.
"""

from __future__ import annotations

from scmdm.data.tokenizers.base import (
    SPECIALS,
    Content,
    GridLayout,
    OwnFraming,
    ReservedSymbol,
    Tokenizer,
    UnknownSymbol,
    as_text,
    block_text,
    is_block,
    is_framed,
    text_ids,
)
from scmdm.data.tokenizers.byte_tokenizer import ByteTokenizer
from scmdm.data.tokenizers.huggingface_tokenizer import (
    HuggingFaceTokenizer,
    ModelIds,
    open_model_tokenizer,
    token_ids,
)
from scmdm.data.tokenizers.level_tokenizer import CodeTokenizer, LevelTokenizer
from scmdm.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from scmdm.data.tokenizers.symbol_tokenizer import (
    CharacterTokenizer,
    DnaTokenizer,
    SelfiesTokenizer,
    SmilesTokenizer,
    SymbolTokenizer,
)
from scmdm.data.tokenizers.tokenizer_file import load_tokenizer
