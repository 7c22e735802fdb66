"""Encode a text word by word, with a cache of the ids of words.

A pipeline of the `tokenizers` library spends most of its time on splitting a text and on tracking offsets. Some
pipelines always split before white space, so that the ids of a word with its leading white space do not depend on its
context. For these, the ids can be cached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_WORD = re.compile(r"\s*\S+|\s+")
_AMBIGUOUS_SPACE = re.compile("[\x1c-\x1f]")  # white space in Python, not in Unicode
_MAX_CHARACTERS = 64  # characters of a cached word
_MAX_WORDS = 1 << 17  # words, about 40 MB


def splits_at_white_space(pipeline: Mapping[str, Any]) -> bool:
    """Return whether a pipeline splits before white space: byte-level BPE with GPT-2's pattern and no normalizer."""
    pre, model = pipeline.get("pre_tokenizer") or {}, pipeline.get("model") or {}
    by_pattern = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    ordinary = [token for token in pipeline.get("added_tokens") or [] if not token.get("special")]
    plain = pipeline.get("normalizer") is None and not ordinary
    return bool(by_pattern and plain and model.get("type") == "BPE" and not model.get("dropout"))


class WordEncoder:
    """Cache for an `encode` that is a function of each word alone."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode, self._known = encode, dict[str, list[int]]()

    def __call__(self, text: str) -> list[int]:
        if _AMBIGUOUS_SPACE.search(text):
            return self._encode(text)
        ids, known = list[int](), self._known
        for word in _WORD.findall(text):
            found = known.get(word)
            ids += self._encode_and_cache(word) if found is None else found
        return ids

    def _encode_and_cache(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= _MAX_CHARACTERS:
            if len(self._known) >= _MAX_WORDS:
                self._known.clear()
            self._known[word] = ids
        return ids
