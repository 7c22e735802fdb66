"""Tokenizers of grids of values: levels of pixels, or codes of a discrete autoencoder.

Ids 0 to 3 are [PAD], [BOS], [EOS] and [MASK]; value v has the id v + 4, so that no image contains a special.

A sequence is [BOS] and then the values, row by row from the top left, with the channels of a pixel next to each other:
this keeps neighbours close under rotary attention. (The published CIFAR-10 code flattens channel by channel for a
U-Net, which restores the shape.) There is no [EOS], because all sequences have the same length. The NELBO therefore
covers the values alone: times log2(e) it is in bits per dimension.

Legend: N samples, L length with [BOS], V values of a sample, H height, W width, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from scmdm.data.tokenizers.base import (
    LARGEST_VOCABULARY,
    SPECIALS,
    Content,
    GridLayout,
    Tokenizer,
    UnknownSymbol,
)
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text
from scmdm.system.untrusted import parse_as


class LevelTokenizer(Tokenizer):
    """Tokenizer of pixel levels; also converts sequences to images."""

    kind = "levels"
    can_spell_specials = False
    pad_id, bos_id, eos_id, mask_id = range(4)

    def __init__(self, layout: GridLayout) -> None:
        self.layout = layout
        self.vocab_size = len(SPECIALS) + layout.levels

    @classmethod
    def build(cls, config: Any, *, symbols: Iterable[str], sample: Iterable[str], layout: GridLayout | None) -> Self:
        assert layout is not None
        return cls(layout)

    @classmethod
    def parse(cls, content: dict[str, Any], path: Path) -> Self:
        layout = parse_as(GridLayout, {name: value for name, value in content.items() if name != "kind"}, path)
        if min(asdict(layout).values()) < 1 or max(layout.values, layout.levels) > LARGEST_VOCABULARY:
            raise ValueError(f"{layout} is not possible; numbers must be from 1 to {LARGEST_VOCABULARY}")
        return cls(layout)

    def _ids_of(self, content: Content) -> list[int]:
        """Return the ids of values, given as bytes of a record or as numbers between blanks. Raises UnknownSymbol."""
        values = np.frombuffer(content, self.layout.dtype).tolist() if isinstance(content, bytes) else _numbers(content)
        wrong = next((value for value in values if value >= self.layout.levels), None)
        if wrong is not None:
            raise UnknownSymbol(f"value {wrong} is not below {self.layout.levels}")
        return [value + len(SPECIALS) for value in values]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the values as numbers separated by blanks, without specials."""
        return " ".join(str(i - len(SPECIALS)) for i in ids if i >= len(SPECIALS))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[i] if i < len(SPECIALS) else str(i - len(SPECIALS)) for i in ids]

    def frame(self, ids: Sequence[int]) -> list[int]:
        """Return the sequence of a sample: [BOS] and its ids."""
        return [self.bos_id, *ids]

    def is_framed(self, ids: Sequence[int]) -> bool:
        """Return whether a sequence is [BOS] and the values of one sample."""
        ids = list(ids)
        return len(ids) == self.layout.length and ids[0] == self.bos_id and min(ids[1:]) >= len(SPECIALS)

    def values(self, ids_NL: np.ndarray) -> np.ndarray:
        """Return the values (N, V) int64 of sequences; 0 where an id is not a value, which `is_framed` detects."""
        values_NV = ids_NL[:, 1 : self.layout.length].astype(np.int64) - len(SPECIALS)
        return np.maximum(values_NV, 0)

    def codes(self, ids_NL: np.ndarray) -> np.ndarray:
        """Return the values (N, H, W) int64 of sequences, in rows; 0 where an id is not a value."""
        return self.values(ids_NL).reshape(-1, self.layout.height, self.layout.width * self.layout.channels)

    def pictures(self, ids_NL: np.ndarray) -> np.ndarray:
        """Return the images (N, H, W, C) uint8 of sequences, with levels scaled to 0 to 255.

        An id that is not a level is black; `is_framed` detects it. Raises UserError for codes, which only their own
        decoder turns into images, and for sequences of another length.
        """
        layout = self.layout
        if self.kind != "levels":
            raise UserError(
                f"the data set holds {self.kind}, not pixels; decode the codes of the samples with the model that "
                "encoded them"
            )
        if ids_NL.shape[1] != layout.length:
            raise UserError(
                f"length={ids_NL.shape[1]} does not fit images of {layout.height} x {layout.width} x "
                f"{layout.channels}; leave length out, or set length={layout.length}"
            )
        steps = max(1, layout.levels - 1)
        grey_NV = (self.values(ids_NL) * 255 + steps // 2) // steps
        return grey_NV.astype(np.uint8).reshape(-1, layout.height, layout.width, layout.channels)

    def picture(self, ids: Sequence[int]) -> np.ndarray:
        """Return the image (H, W, C) uint8 of one sequence, as `pictures` returns it."""
        picture_HWC: np.ndarray = self.pictures(np.asarray(ids)[None])[0]
        return picture_HWC

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        atomic_write_text(path, json.dumps({"kind": self.kind, **asdict(self.layout)}, indent=1) + "\n")
        return path


class CodeTokenizer(LevelTokenizer):
    """Tokenizer of the codes of a discrete autoencoder."""

    kind = "codes"


def _numbers(text: str) -> list[int]:
    words = text.split()
    wrong = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) <= 8)), None)
    if wrong is not None:
        raise UnknownSymbol(f"{wrong[:40]!r} is not a number of at most 8 digits")
    return [int(word) for word in words]
