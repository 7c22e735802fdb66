"""Values as they are: levels of pixels, or codes of a discrete autoencoder.

Ids 0 to 3 are padding, beginning, end and mask; value v is id v + 4, so that no picture holds a special.

A sequence is `[BOS]` and then the values, row by row from the top left, the channels of a pixel side by side: to rotary
attention what belongs together is near. (The published CIFAR-10 code flattens channel by channel, for a U-Net, which
restores the shape.) There is no `[EOS]`: all sequences are equally long, so an end mark would tell nothing, and
the NELBO is over the values alone: times log2(e) it is in bits per dimension.

Legend: N samples, L length with [BOS], V values of a sample, H height, W width, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from scmdm.data.tokenizers.base import SPECIALS, Content, UnknownSymbol
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text

KINDS = ("levels", "codes")


@dataclass(frozen=True)
class Layout:
    """What the values of a sample are: a picture of so many levels a channel, or rows of codes (channels 1)."""

    height: int
    width: int
    channels: int
    levels: int  # values are below it

    @property
    def values(self) -> int:
        """Values of a sample."""
        return self.height * self.width * self.channels

    @property
    def length(self) -> int:
        """Ids of a sample: the values behind [BOS]."""
        return 1 + self.values

    @property
    def dtype(self) -> np.dtype:
        """How a value stands in the bytes of a record."""
        return np.dtype("u1" if self.levels <= 1 << 8 else "<u2" if self.levels <= 1 << 16 else "<u4")

    def mirrored(self, content: bytes) -> bytes:
        """The bytes of a picture with left and right exchanged."""
        values_HWC = np.frombuffer(content, self.dtype).reshape(self.height, self.width, self.channels)
        return values_HWC[:, ::-1].tobytes()


class LevelTokenizer:
    """Ids of values, and pictures of ids."""

    pad_id, bos_id, eos_id, mask_id = range(4)

    def __init__(self, kind: str, layout: Layout) -> None:
        self.kind = kind
        self.layout = layout
        self.vocab_size = len(SPECIALS) + layout.levels

    @classmethod
    def parse(cls, content: dict[str, object]) -> LevelTokenizer:
        """From the content of its file. Raises TypeError for what is none."""
        layout = {key: value for key, value in content.items() if key != "kind"}
        if not all(isinstance(value, int) and value > 0 for value in layout.values()):
            raise TypeError(f"a layout of {layout}")
        return cls(str(content["kind"]), Layout(**layout))  # type: ignore[arg-type]

    def encode(self, content: Content) -> list[int]:
        """Ids of values: bytes of a record, or numbers with blanks between them (a prompt). Raises UnknownSymbol."""
        values = np.frombuffer(content, self.layout.dtype).tolist() if isinstance(content, bytes) else _numbers(content)
        wrong = next((value for value in values if value >= self.layout.levels), None)
        if wrong is not None:
            raise UnknownSymbol(f"value {wrong} where there are {self.layout.levels} levels")
        return [value + len(SPECIALS) for value in values]

    def decode(self, ids: Sequence[int]) -> str:
        """The values as numbers with blanks between them, specials left out."""
        return " ".join(str(i - len(SPECIALS)) for i in ids if i >= len(SPECIALS))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[i] if i < len(SPECIALS) else str(i - len(SPECIALS)) for i in ids]

    def frame(self, ids: Sequence[int]) -> list[int]:
        """The sequence of a sample's ids."""
        return [self.bos_id, *ids]

    def is_framed(self, ids: Sequence[int]) -> bool:
        """Whether the sequence is `[BOS]` and as many values as a sample has."""
        ids = list(ids)
        return len(ids) == self.layout.length and ids[0] == self.bos_id and min(ids[1:]) >= len(SPECIALS)

    def values(self, ids_NL: np.ndarray) -> np.ndarray:
        """Values (N, V) of sequences; 0 where an id is none: `is_framed` tells."""
        values_NV = ids_NL[:, 1 : self.layout.length].astype(np.int64) - len(SPECIALS)
        return np.maximum(values_NV, 0)

    def codes(self, ids_NL: np.ndarray) -> np.ndarray:
        """Values (N, H, W) of sequences, in rows; 0 where an id is none, as in `values`."""
        return self.values(ids_NL).reshape(-1, self.layout.height, self.layout.width * self.layout.channels)

    def pictures(self, ids_NL: np.ndarray) -> np.ndarray:
        """Pictures (N, H, W, C) uint8 of sequences: the lowest level is black, the highest 255, and so is between.

        What is no level is black, and `is_framed` tells. Raises UserError for codes, of which only their own decoder
        can make pictures, and for sequences of another length.
        """
        layout = self.layout
        if self.kind != "levels":
            raise UserError(
                f"the data set holds {self.kind}, of which only the model that made them can make pictures; give it "
                "the codes of the samples"
            )
        if ids_NL.shape[1] != layout.length:
            raise UserError(
                f"length={ids_NL.shape[1]} is no picture of {layout.height} x {layout.width} x {layout.channels}; "
                f"leave length out, or set length={layout.length}"
            )
        steps = max(1, layout.levels - 1)
        grey_NV = (self.values(ids_NL) * 255 + steps // 2) // steps
        return grey_NV.astype(np.uint8).reshape(-1, layout.height, layout.width, layout.channels)

    def picture(self, ids: Sequence[int]) -> np.ndarray:
        """`pictures` of one sequence: (H, W, C) uint8."""
        picture_HWC: np.ndarray = self.pictures(np.asarray(ids)[None])[0]
        return picture_HWC

    def save(self, directory: Path) -> Path:
        path = directory / "tokenizer.json"
        atomic_write_text(path, json.dumps({"kind": self.kind, **asdict(self.layout)}, indent=1) + "\n")
        return path


def _numbers(text: str) -> list[int]:
    words = text.split()
    wrong = next((word for word in words if not (word.isascii() and word.isdigit())), None)
    if wrong is not None:
        raise UnknownSymbol(f"{wrong!r} is no number")
    return [int(word) for word in words]
