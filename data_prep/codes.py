"""Codes of the user's discrete autoencoder (VQ-VAE, VQ-GAN, ...): `.npy` files of integers.

Legend: N samples, L codes of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from omegaconf import MISSING

from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts
from scmdm.data.preparation.source import GridSource
from scmdm.data.tokenizers import GridLayout
from scmdm.errors import UserError

_ROWS = 1024  # rows read from the mapped file at a time


@dataclass
class CodeSourceConfig(SourceConfig):
    """Keys of the source `codes`."""

    path: str = key(MISSING, path=PathKind.INPUT, formerly=("path",), help=".npy file of integers, or a folder of them")
    levels: int = key(MISSING, formerly=("levels",), help="size of the codebook", at_least=2, at_most=1 << 24)


class CodeSource(GridSource):
    """Rows of one `.npy` file, or of all `.npy` files in a folder, sorted by name.

    Files have the shape (samples, codes) or (samples, rows, codes).
    """

    Config = CodeSourceConfig
    tokenizers = ("codes",)

    def __init__(self, config: CodeSourceConfig, length: int) -> None:
        self.path, self._levels = Path(config.path), config.levels
        self.name = self.path.resolve().stem
        self._require_length(length, self.layout)

    @cached_property
    def layout(self) -> GridLayout:
        """Shape of the samples. Raises UserError when those of two files differ."""
        shapes = {name: _mapped(path).shape[1:] for name, path in self.files().items()}
        first, shape = next(iter(shapes.items()))
        other = next((name for name, found in shapes.items() if found != shape), None)
        if other is not None:
            raise UserError(
                f"source.path={self.path}: samples of {other} have {_size(shapes[other])} codes, but those of "
                f"{first} have {_size(shape)}; give files of one model"
            )
        height, width = (1, *shape)[-2:]
        return GridLayout(height, width, 1, self._levels)

    def files(self) -> dict[str, Path]:
        """Files by name. Raises UserError when there are none."""
        paths = [self.path] if self.path.is_file() else sorted(self.path.glob("*.npy"))
        if not paths:
            raise UserError(f"source.path={self.path} is neither a .npy file nor a folder of them; give one")
        return {path.name: path for path in paths}

    def parts(self, part_bytes: int) -> list[Part]:
        """Whole files."""
        return cut_into_parts(self.files(), part_bytes)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Samples, row by row; drops those with a code outside the codebook."""
        files = self.files()
        for piece in part.slices:
            codes = _mapped(files[piece.file])
            codes_NL = codes.reshape(len(codes), -1)
            for start in range(0, len(codes_NL), _ROWS):
                for row, codes_L in enumerate(codes_NL[start : start + _ROWS], start):
                    tally.read()
                    if codes_L.min() < 0 or codes_L.max() >= self.layout.levels:
                        found = f"codes from {codes_L.min()} to {codes_L.max()}"
                        tally.drop("no such code", f"{files[piece.file]}, row {row}: {found}")
                        continue
                    yield Record(codes_L.astype(self.layout.dtype).tobytes())


def _mapped(path: Path) -> np.ndarray:
    try:
        codes: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}); give a .npy file of integers") from error
    if codes.ndim not in (2, 3) or 0 in codes.shape[1:] or codes.dtype.kind not in "ui":
        raise UserError(
            f"{path} holds {codes.dtype} of shape {codes.shape}; expected integers of shape (samples, codes) or "
            "(samples, rows, codes)"
        )
    return codes


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
