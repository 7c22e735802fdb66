"""Pictures in the format of MNIST: four IDX files, of pictures and labels of a training and a test set.

Legend: N pictures, H height, W width.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.corpus_files import kind_of
from data_prep.debian_packages import copy_file, unpacked_package
from data_prep.decompression import read_chunks
from data_prep.images import ImageSourceConfig, PixelSource, quantise
from scmdm.config.fields import PathKind, key
from scmdm.data.preparation.records import Part, Record, Slice, Tally
from scmdm.data.tokenizers import GridLayout
from scmdm.errors import UserError
from scmdm.system.package_data import cached_folder
from scmdm.system.untrusted import reading, require_regular

_FASHION = "dataset-fashion-mnist"  # Debian's package (MIT licence; Xiao, Rasul and Vollgraf 2017)
_FASHION_FOLDER = "usr/share/datasets/fashion-mnist"
_FASHION_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_STEMS = {"train": "train", "test": "t10k"}  # of the names of files, by split
_UNSIGNED_BYTES = 0x08  # the only type of MNIST's files
_LARGEST_SIDE = 1 << 12
_MOST_PICTURES = 1 << 24
_INSTEAD = "give a folder of MNIST's files as source.path=..."


@dataclass
class IdxSourceConfig(ImageSourceConfig):
    """Keys of the source `idx`."""

    path: str | None = key(
        None,
        path=PathKind.INPUT,
        help="folder of MNIST's four files, compressed or not; null: Fashion-MNIST from Debian's package",
    )
    pool: int = key(
        1,
        help="replace squares of pool x pool pixels by their mean; height and width must be multiples of it",
        at_least=1,
        at_most=_LARGEST_SIDE,
    )

    @property
    def splits_by_name(self) -> bool:
        """Training and test set are published, so that validation_fraction may be 0: then there is no such split."""
        return True


class IdxSource(PixelSource):
    """MNIST, Fashion-MNIST, KMNIST: published training and test sets; validation is taken out of the training set."""

    Config = IdxSourceConfig

    def __init__(self, config: IdxSourceConfig, length: int) -> None:
        packaged = config.path is None
        path = _fashion_mnist() if config.path is None else Path(config.path)
        self.name = "fashion-mnist" if packaged else path.resolve().name
        self._pool = config.pool
        self._images = {split: _find(path, f"{stem}-images") for split, stem in _STEMS.items()}
        self._label_files = {split: _find(path, f"{stem}-labels") for split, stem in _STEMS.items()}
        self._labels_N = {split: read_idx(file, 1) for split, file in self._label_files.items()}
        height, width = self._require_one_shape()
        if height % config.pool or width % config.pool:
            raise UserError(
                f"source.pool={config.pool} is not possible with pictures of {height} x {width} pixels; it must divide "
                "both"
            )
        classes = 1 + max(int(labels_N.max()) for labels_N in self._labels_N.values())
        self.labels = _FASHION_LABELS if packaged else tuple(map(str, range(classes)))
        super().__init__(config, length, GridLayout(height // self._pool, width // self._pool, 1, config.levels or 256))

    def _require_one_shape(self) -> tuple[int, int]:
        """Return height and width. Raises UserError if the sets differ, or if there is not one label per picture."""
        shapes = {split: idx_shape(file, 3) for split, file in self._images.items()}
        for split, (count, *size) in shapes.items():
            if count != len(self._labels_N[split]):
                raise UserError(
                    f"{self._images[split]} has {count:,} pictures and {self._label_files[split]} "
                    f"{len(self._labels_N[split]):,} labels; give files that belong together"
                )
            if tuple(size) != shapes["train"][1:]:
                raise UserError(
                    f"{self._images[split]} has pictures of {size[0]} x {size[1]} pixels, and those of "
                    f"{self._images['train']} have another size; give files that belong together"
                )
        return shapes["train"][1], shapes["train"][2]

    @property
    def published(self) -> tuple[str, ...]:
        return tuple(_STEMS)

    def files(self) -> dict[str, Path]:
        """The four files, by their names without suffixes."""
        images = {f"{_STEMS[split]}-images": file for split, file in self._images.items()}
        return images | {f"{_STEMS[split]}-labels": file for split, file in self._label_files.items()}

    def parts(self, part_bytes: int) -> list[Part]:
        """One part for each split, because compressed files are read from their start."""
        return [Part((Slice(f"{stem}-images"),), split) for split, stem in _STEMS.items()]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield pictures with their labels."""
        assert part.split is not None
        pictures_NHW = read_idx(self._images[part.split], 3)
        for picture_HW, label in zip(pictures_NHW, self._labels_N[part.split], strict=True):
            tally.read()
            yield Record(quantise(pooled(picture_HW, self._pool), self.layout.levels).tobytes(), int(label))


def pooled(picture_HW: np.ndarray, pool: int) -> np.ndarray:
    """Return the means of the squares of `pool` x `pool` pixels, rounded to the nearest, uint8."""
    height, width = picture_HW.shape
    squares = picture_HW.reshape(height // pool, pool, width // pool, pool).sum((1, 3), dtype=np.uint64)
    return ((squares + pool * pool // 2) // (pool * pool)).astype(np.uint8)


def idx_shape(path: Path, dimensions: int) -> tuple[int, ...]:
    """Return the shape in the header of an IDX file of unsigned bytes. Raises UserError for other contents."""
    content = _read_start(path, _header_bytes(dimensions))
    return _parse_header(content, path, dimensions)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with this number of dimensions. Raises UserError for other contents."""
    require_regular(path)
    expected = _header_bytes(dimensions) + math.prod(idx_shape(path, dimensions))
    content = _read_start(path, expected + 1)
    if len(content) != expected:
        found = "more" if len(content) > expected else f"{len(content):,}"
        raise UserError(f"{path} should have {expected:,} bytes by its header, but has {found}; {_INSTEAD}")
    shape = _parse_header(content, path, dimensions)
    return np.frombuffer(content, np.uint8, offset=_header_bytes(dimensions)).reshape(shape)


def _read_start(path: Path, size: int) -> bytearray:
    """Return the first `size` bytes of a file, decompressed, or a few more; all if it has fewer."""
    content = bytearray()
    with reading(path, "IDX file", _INSTEAD), open(path, "rb") as file:
        for chunk in read_chunks(file, kind_of(path.name).compression):  # empty until a block is complete
            content += chunk
            if len(content) >= size:
                break
    return content


def _header_bytes(dimensions: int) -> int:
    return 4 + 4 * dimensions


def _parse_header(content: bytes | bytearray, path: Path, dimensions: int) -> tuple[int, ...]:
    """Parse two zero bytes, the type, the number of dimensions and, as big-endian integers, the shape."""
    size, wanted = _header_bytes(dimensions), bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    if len(content) < size or content[:4] != wanted:
        raise UserError(
            f"{path} begins with {bytes(content[:4]).hex(' ')}, not with {wanted.hex(' ')}, the header of an IDX file "
            f"of unsigned bytes with {dimensions} dimension(s); {_INSTEAD}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:size])
    if not all(1 <= side <= _LARGEST_SIDE for side in shape[1:]) or not 1 <= shape[0] <= _MOST_PICTURES:
        raise UserError(
            f"{path} has the shape {' x '.join(map(str, shape))}; there must be from 1 to {_MOST_PICTURES:,} pictures, "
            f"of sides from 1 to {_LARGEST_SIDE:,}"
        )
    return shape


def _find(folder: Path, stem: str) -> Path:
    """Return the file of a name such as `train-images-idx3-ubyte`, compressed or not; `.` may replace a `-`."""
    if not folder.is_dir():
        raise UserError(f"source.path={folder} is not a folder; {_INSTEAD}")
    found = sorted(path for path in folder.iterdir() if path.name.startswith(stem))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:3]) or "no such file"
        raise UserError(f"{folder} should have one file whose name begins with {stem}; found: {names}; {_INSTEAD}")
    return found[0]


def _fashion_mnist() -> Path:
    """Return the folder of Fashion-MNIST in the user's cache, after its download if it is not there."""
    names = [f"{stem}-{kind}-ubyte.gz" for stem in _STEMS.values() for kind in ("images-idx3", "labels-idx1")]

    def make(folder: Path) -> None:
        with unpacked_package(_FASHION, _INSTEAD) as unpacked:
            for name in names:
                copy_file(_FASHION, unpacked / _FASHION_FOLDER / name, folder / name, _INSTEAD)

    return cached_folder("fashion-mnist", make)
