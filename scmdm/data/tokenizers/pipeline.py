"""Pipelines of the `tokenizers` library: load them from files of others, and encode without losing a symbol.

A model without a token for unknown symbols drops them silently (BPE) or raises an error (WordLevel, Unigram). Here such
a model encodes with a token of its own for them, which is in no vocabulary, so that each is found whatever the kind of
model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tokenizers

from scmdm.data.tokenizers.base import UnknownSymbol
from scmdm.errors import UserError
from scmdm.system.untrusted import describe

_STAND_IN = "\ufdd0unknown"  # begins with a code point that is reserved for use inside a program
_BYTES = 256


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic of a library in Rust, which is no `Exception`, into ValueError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ != "PanicException":
            raise
        raise ValueError(describe(error)) from error


def load_pipeline(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Make the library's tokenizer, set to encode the names of special tokens as ordinary text. Raises ValueError."""
    try:
        with panics_as_errors():
            found = tokenizers.Tokenizer.from_str(json.dumps(content))
            found.no_padding()
            found.no_truncation()
            if getattr(found.model, "dropout", None) is not None:
                found.model.dropout = None  # of BPE: the same text would have other ids each time
            found.encode_special_tokens = True
            found.decode([])
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizers library cannot load it: {describe(error)}") from error
    return found


def require_stated_ids(content: Mapping[str, Any], tokenizer: tokenizers.Tokenizer, where: str) -> None:
    """Raise UserError unless added tokens have the ids that `content` states, the content of a `tokenizer.json`.

    The library numbers added tokens in their order, without an error where the file has other ids, as behind a gap.
    """
    for token in content.get("added_tokens") or ():
        name, stated = token["content"], token["id"]
        found = tokenizer.token_to_id(name)
        if name and found != stated:  # the library adds no token without a name
            raise UserError(
                f"{where}: the added token {name!r:.60} has the id {stated}, but the tokenizers library gives it "
                f"{found}; correct its id, or add tokens to the file for the ids before it that have none"
            )


class PipelineEncoder:
    """Encoder that raises UnknownSymbol for a symbol for which the model has no id.

    Args:
        content: content of a `tokenizer.json`.
        tokenizer: `load_pipeline(content)`.
    """

    def __init__(self, content: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
        self.unk_id = _unk_id(content, tokenizer)  # None: the model has no token for unknown symbols
        self._tokenizer, self._stand_in, self._moved = tokenizer, -1, dict[int, int]()
        if self.unk_id is not None or _covers_bytes(content):
            return
        self._tokenizer = load_pipeline(_with_stand_in(content))
        self._stand_in = self._tokenizer.token_to_id(_STAND_IN)
        for token in tokenizer.get_added_tokens_decoder().values():  # numbered after the model's vocabulary
            self._moved[self._tokenizer.token_to_id(token.content)] = tokenizer.token_to_id(token.content)

    def __call__(self, text: str) -> list[int]:
        try:
            with panics_as_errors():
                found = self._tokenizer.encode(text, add_special_tokens=False)
                ids: list[int] = found.ids
        except Exception as error:  # the library raises nothing narrower
            raise UnknownSymbol(f"{text[:80]!r} cannot be encoded: {describe(error)}") from error
        if self._stand_in < 0:
            return ids
        if self._stand_in in ids:
            start, end = found.offsets[ids.index(self._stand_in)]
            raise UnknownSymbol(f"unknown symbol {text[start:end][:40]!r} at character {start}")
        return [self._moved.get(i, i) for i in ids]


def _unk_id(content: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> int | None:
    model = content["model"]
    if isinstance(model.get("unk_id"), int):  # Unigram
        return int(model["unk_id"])
    name = model.get("unk_token")
    return tokenizer.token_to_id(name) if isinstance(name, str) and name in _names(model) else None


def _names(model: Mapping[str, Any]) -> set[str]:
    vocabulary = model.get("vocab") or {}
    return set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}


def _covers_bytes(content: Mapping[str, Any]) -> bool:
    """Return whether the model has a token for each byte of a text, so that no symbol is unknown to it."""
    model, names = content["model"], _names(content["model"])
    if model.get("type") not in (None, "BPE"):
        return False
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in names for byte in range(_BYTES))
    steps = json.dumps([content.get("pre_tokenizer"), content.get("normalizer")])
    return '"ByteLevel"' in steps and names.issuperset(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _with_stand_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with a token for unknown symbols, after all others."""
    changed = {**content, "model": copy.copy(content["model"])}
    model = changed["model"]
    if isinstance(model["vocab"], list):
        model["unk_id"] = len(model["vocab"])
        lowest = min((score for _, score in model["vocab"]), default=0.0)
        model["vocab"] = [*model["vocab"], [_STAND_IN, lowest]]
    else:
        model["vocab"] = {**model["vocab"], _STAND_IN: max(model["vocab"].values(), default=-1) + 1}
        model["unk_token"] = _STAND_IN
    return changed
