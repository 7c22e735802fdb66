"""Ids of a text from those of its words, each of which is encoded once.

A pipeline spends most of its time on cutting a text and on where each piece came from. For some it is certain that
white space behind anything else begins a new piece, and that the ids of what lies between two such places depend on
nothing around it: then they can be looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_WORD = re.compile(r"\s*\S+|\s+")
_NOT_AGREED = re.compile("[\x1c-\x1f]")  # white space to Python, not to Unicode
_LONGEST = 64  # characters of a word that is kept
_MOST = 1 << 17  # words, about 40 MB


def words_are_apart(pipeline: Mapping[str, Any]) -> bool:
    """Whether white space begins a new piece: byte-level BPE with GPT-2's pattern and nothing before it."""
    pre, model = pipeline.get("pre_tokenizer") or {}, pipeline.get("model") or {}
    by_pattern = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    ordinary = [token for token in pipeline.get("added_tokens") or [] if not token.get("special")]
    plain = pipeline.get("normalizer") is None and not ordinary
    return bool(by_pattern and plain and model.get("type") == "BPE" and not model.get("dropout"))


class WordEncoder:
    """`encode`, which is a function of each word alone, with a memory."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode, self._known = encode, dict[str, list[int]]()

    def __call__(self, text: str) -> list[int]:
        if _NOT_AGREED.search(text):
            return self._encode(text)
        ids, known = list[int](), self._known
        for word in _WORD.findall(text):
            found = known.get(word)
            ids += self._learn(word) if found is None else found
        return ids

    def _learn(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= _LONGEST:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[word] = ids
        return ids
