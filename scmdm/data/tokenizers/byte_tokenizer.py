"""The bytes of a text in UTF-8: a fixed vocabulary that has every text.

Ids 0 to 3 are padding, beginning, end and mask; byte `b` is id `b + 4`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scmdm.data.tokenizers.base import SPECIALS, Content, text_ids
from scmdm.system.files import atomic_write_text


class ByteTokenizer:
    """256 byte values behind the specials."""

    kind = "bytes"
    vocab_size = len(SPECIALS) + 256
    pad_id, bos_id, eos_id, mask_id = range(4)

    def encode(self, content: Content) -> list[int]:
        raw = content if isinstance(content, bytes) else content.encode()
        return [value + len(SPECIALS) for value in raw]

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first end mark; bytes that are no UTF-8, as a model may draw them, become U+FFFD."""
        return bytes(i - len(SPECIALS) for i in text_ids(ids, self)).decode(errors="replace")

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[i] if i < len(SPECIALS) else f"<0x{i - len(SPECIALS):02X}>" for i in ids]

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        atomic_write_text(path, json.dumps({"kind": self.kind}) + "\n")
        return path
