"""Codes of a discrete autoencoder (VQ-VAE, VQ-GAN, ...) that the user has: `.npy` files of whole numbers.

Legend: N samples, L codes of a sample, H rows of them, W codes of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.images import check_length
from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.records import Part, Record, Tally, cut_into_parts
from scmdm.data.tokenizers import Layout
from scmdm.errors import UserError

_ROWS = 1024  # read from the mapped file at a time


class Codes:
    """The rows of one `.npy` file or of all in a folder, sorted by name."""

    whole_records = True
    published: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __init__(self, path: Path, levels: int) -> None:
        self.path, self._levels = path, levels
        self.name = path.resolve().stem

    @classmethod
    def of(cls, config: PrepareConfig) -> Codes:
        """As the keys path and levels say. Raises UserError for files that are none, or another length."""
        assert config.levels is not None
        source = cls(Path(str(config.path)), config.levels)
        check_length(config, source.layout)
        return source

    @cached_property
    def layout(self) -> Layout:
        """Of the first file; UserError when samples of another one have another shape."""
        shapes = {name: _mapped(path).shape[1:] for name, path in self.files().items()}
        first, shape = next(iter(shapes.items()))
        other = next((name for name, found in shapes.items() if found != shape), None)
        if other is not None:
            raise UserError(
                f"{self.path}: {other} has {_size(shapes[other])} codes a sample, {first} has {_size(shape)}; give "
                "files of one model"
            )
        height, width = (1, *shape)[-2:]
        return Layout(height, width, 1, self._levels)

    def files(self) -> dict[str, Path]:
        """By name. Raises UserError when there is none."""
        paths = [self.path] if self.path.is_file() else sorted(self.path.glob("*.npy"))
        if not paths:
            raise UserError(f"path={self.path} is no .npy file and no folder of them; give one")
        return {path.name: path for path in paths}

    def parts(self, part_bytes: int) -> list[Part]:
        """Files together; none is divided."""
        return cut_into_parts(self.files(), part_bytes)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Samples, row by row; one with a code that the codebook does not have is left out."""
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
        raise UserError(f"{path} cannot be read ({reason}); give a .npy file of whole numbers") from error
    if codes.ndim not in (2, 3) or 0 in codes.shape[1:] or codes.dtype.kind not in "ui":
        raise UserError(
            f"{path} holds {codes.dtype} of shape {codes.shape}; expected whole numbers of shape (samples, codes) or "
            "(samples, rows, codes)"
        )
    return codes


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
