"""Tokenizer of UTF-8 bytes: a fixed vocabulary that covers every text.

Ids 0 to 3 are [PAD], [BOS], [EOS] and [MASK]; byte `b` has the id `b + 4`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from scmdm.data.tokenizers.base import SPECIALS, Content, GridLayout, Tokenizer, text_ids
from scmdm.system.files import atomic_write_text
from scmdm.system.untrusted import parse_as


@dataclass(frozen=True)
class _ByteFile:
    kind: str


class ByteTokenizer(Tokenizer):
    """Tokenizer of the 256 byte values."""

    kind = "bytes"
    can_spell_specials = False
    vocab_size = len(SPECIALS) + 256
    pad_id, bos_id, eos_id, mask_id = range(4)

    @classmethod
    def build(cls, config: Any, *, symbols: Iterable[str], sample: Iterable[str], layout: GridLayout | None) -> Self:
        return cls()

    @classmethod
    def parse(cls, content: dict[str, Any], path: Path) -> Self:
        parse_as(_ByteFile, content, path)
        return cls()

    def _ids_of(self, content: Content) -> list[int]:
        raw = content if isinstance(content, bytes) else content.encode()
        return [value + len(SPECIALS) for value in raw]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text before the first [EOS]; invalid UTF-8, which a model may sample, becomes U+FFFD."""
        return bytes(i - len(SPECIALS) for i in text_ids(ids, self)).decode(errors="replace")

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[i] if i < len(SPECIALS) else f"<0x{i - len(SPECIALS):02X}>" for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        atomic_write_text(path, json.dumps({"kind": self.kind}) + "\n")
        return path
