"""Codes of the user's discrete autoencoder (VQ-VAE, VQ-GAN, ...): `.npy` files of integers.

Legend: N samples, L codes of a sample.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from omegaconf import MISSING

from data_prep.corpus_files import (
    FoundFiles,
    NamedFiles,
    NamedSplitsConfig,
    find_files,
)
from scmdm.config.fields import PathKind, key
from scmdm.data.preparation.records import Part, Record, Tally
from scmdm.data.preparation.source import GridSource
from scmdm.data.tokenizers import GridLayout
from scmdm.errors import UserError
from scmdm.system.untrusted import reading, require_regular

_ROWS = 1024  # rows read from the mapped file at a time


@dataclass
class CodeSourceConfig(NamedSplitsConfig):
    """Keys of the source `codes`."""

    path: str = key(MISSING, path=PathKind.INPUT, formerly=("path",), help=".npy file of integers, or a folder of them")
    levels: int = key(MISSING, formerly=("levels",), help="size of the codebook", at_least=2, at_most=1 << 24)


class CodeSource(NamedFiles, GridSource):
    """Rows of one `.npy` file, or of all `.npy` files below a folder, sorted by path.

    Files have the shape (samples, codes) or (samples, rows, codes).
    """

    Config = CodeSourceConfig
    tokenizers = ("codes",)

    def __init__(self, config: CodeSourceConfig, length: int) -> None:
        self.path, self._levels = Path(config.path), config.levels
        self.name = Path(os.path.abspath(self.path)).stem
        self._split_by = config.split_by
        self._require_length(length, self.layout)

    def _find(self) -> FoundFiles:
        return find_files(self.path, ("npy",), any_suffix=True)

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

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Samples, row by row; drops those with a code outside the codebook."""
        files = self.files()
        for piece in part.slices:
            codes = _mapped(files[piece.file])
            for start in range(0, len(codes), _ROWS):
                block = codes[start : start + _ROWS]  # reshaped alone, because this copies some layouts
                for row, codes_L in enumerate(block.reshape(len(block), -1), start):
                    tally.read()
                    if codes_L.min() < 0 or codes_L.max() >= self.layout.levels:
                        found = f"codes from {codes_L.min()} to {codes_L.max()}"
                        tally.drop("no such code", f"{files[piece.file]}, row {row}: {found}")
                        continue
                    yield Record(codes_L.astype(self.layout.dtype).tobytes())


def _mapped(path: Path) -> np.ndarray:
    with reading(path, ".npy file", "give a .npy file of integers"):
        with open(path, "rb") as file:
            shape, dtype = _header(file)
            expected, found = file.tell() + math.prod(shape) * dtype.itemsize, require_regular(path).st_size
        if dtype.kind not in "ui" or len(shape) not in (2, 3) or any(size < 1 for size in shape[1:]) or shape[0] < 0:
            raise UserError(
                f"{path} holds {dtype} of shape {shape}; expected integers of shape (samples, codes) or "
                "(samples, rows, codes)"
            )
        if expected != found:  # before memory is mapped, because NumPy's sizes overflow
            raise UserError(f"{path} has {found} bytes instead of {expected} for {dtype} of shape {shape}; restore it")
        if shape[0] == 0:
            return np.zeros(shape, dtype)
        return np.lib.format.open_memmap(path, mode="r")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format is not supported")
    shape, _, dtype = read(file)
    return shape, dtype


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
