"""Images as levels of pixels: CIFAR-10's binary version, folders of PNG and JPEG, scikit-learn's digits.

A record is the bytes of one image, row by row from the top left, with the channels of a pixel next to each other.

Legend: H height, W width, C channels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from data_prep.corpus_files import (
    FoundFiles,
    NamedFiles,
    NamedSplitsConfig,
    find_files,
    without_split,
)
from scmdm.config.fields import PathKind, key
from scmdm.config.preparation import SourceConfig
from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts
from scmdm.data.preparation.source import GridSource
from scmdm.data.tokenizers import GridLayout
from scmdm.errors import UserError
from scmdm.system.package_data import optional, package_folder
from scmdm.system.untrusted import reading

_CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_BYTES = 1 + 3 * 32 * 32  # bytes per record: label, red, green and blue plane
_CIFAR10_TRAIN, _CIFAR10_TEST = tuple(f"data_batch_{n}.bin" for n in range(1, 6)), ("test_batch.bin",)
_FORMATS = ("png", "jpeg")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes of up to 8 bits per channel
_PILLOW = ("PIL.Image", "PIL.ImageOps")
_ORIENTATION = 0x0112  # tag of EXIF: number of one of the methods below, with which a picture is shown upright
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_DIGITS_FILE, _DIGITS_COLUMNS = "digits.csv.gz", 8 * 8 + 1


@dataclass
class ImageSourceConfig(SourceConfig):
    """Keys that all sources of images have."""

    levels: int | None = key(None, formerly=("levels",), help="levels per channel; null: 256", at_least=2, at_most=256)
    flips: bool = key(False, formerly=("flips",), help="add the mirror image of every record to the training split")


@dataclass
class Cifar10Config(ImageSourceConfig):
    """Keys of the source `cifar10`."""

    path: str = key(MISSING, path=PathKind.INPUT, formerly=("path",), help="folder of CIFAR-10's binary version")

    @property
    def splits_by_name(self) -> bool:
        """Training and test set are published, so that validation_fraction may be 0: then there is no such split."""
        return True


@dataclass
class ImageFolderConfig(ImageSourceConfig, NamedSplitsConfig):
    """Keys of the source `images`."""

    path: str = key(
        MISSING,
        path=PathKind.INPUT,
        formerly=("path",),
        help="folder of .png and .jpeg files: one sub-folder per class or none, below one per split or none",
    )
    image_size: int = key(
        MISSING, formerly=("image_size",), help="height and width in pixels", at_least=1, at_most=2**16
    )
    on_size: str = key(
        "crop",
        formerly=("on_size",),
        help="images of another size are scaled and centre-cropped (crop), or dropped (drop)",
        choices=("crop", "drop"),
    )
    colour: str = key("rgb", formerly=("colour",), help="colour channels of the images", choices=("rgb", "grey"))


@dataclass
class DigitSourceConfig(ImageSourceConfig):
    """Keys of the source `digits`."""

    levels: int | None = key(None, formerly=("levels",), help="levels per pixel; null: 17", at_least=2, at_most=17)


def quantise(pixels: np.ndarray, levels: int, source_levels: int = 256) -> np.ndarray:
    """Map uint8 values below `source_levels` to values below `levels`, in steps of equal size."""
    return (pixels.astype(np.uint16) * levels // source_levels).astype(np.uint8)


class PixelSource(GridSource):
    """Base of sources of images, all of the same layout."""

    tokenizers = ("levels",)

    def __init__(self, config: ImageSourceConfig, length: int, layout: GridLayout) -> None:
        self._layout, self._flips = layout, config.flips
        self._require_length(length, layout)

    @property
    def layout(self) -> GridLayout:
        return self._layout

    def mirror_image(self, record: Record) -> Record | None:
        """Return the image with left and right exchanged; None without `flips`."""
        if not self._flips:
            return None
        assert isinstance(record.content, bytes)
        return replace(record, content=self._layout.mirrored(record.content))


class Cifar10Source(PixelSource):
    """CIFAR-10 (Krizhevsky 2009): published training and test sets; validation is taken out of the training set.

    Only the binary version is read: unpickling the Python version could run arbitrary code.
    """

    Config = Cifar10Config
    name = "cifar10"
    labels = _CIFAR10_LABELS

    def __init__(self, config: Cifar10Config, length: int) -> None:
        self.path = Path(config.path)
        super().__init__(config, length, GridLayout(32, 32, 3, config.levels or 256))

    @property
    def published(self) -> tuple[str, ...]:
        return "train", "test"

    def files(self) -> dict[str, Path]:
        """The six files. Raises UserError when one is missing or incomplete."""
        files = {name: self.path / name for name in (*_CIFAR10_TRAIN, *_CIFAR10_TEST)}
        for path in files.values():
            if not path.is_file():
                raise UserError(
                    f"{path} is missing; give CIFAR-10's binary version as source.path=.../cifar-10-batches-bin"
                )
            size = path.stat().st_size
            if size == 0 or size % _CIFAR10_BYTES:
                raise UserError(
                    f"{path} has {size} bytes, not a multiple of a record's {_CIFAR10_BYTES}; download the binary "
                    "version of CIFAR-10 again"
                )
        return files

    def parts(self, part_bytes: int) -> list[Part]:
        """Ranges of the training files, then of the test file."""
        files = self.files()
        return [
            part
            for split, names in (("train", _CIFAR10_TRAIN), ("test", _CIFAR10_TEST))
            for part in cut_into_parts({name: files[name] for name in names}, part_bytes, lambda path: True, split)
        ]

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield images with their labels; drop records with an invalid label."""
        files = self.files()
        for piece in part.slices:
            for at, raw in _fixed_records(files[piece.file], piece, _CIFAR10_BYTES):
                tally.read()
                if raw[0] >= len(self.labels):
                    tally.drop("no such label", f"{files[piece.file]} at byte {at}: label {raw[0]}")
                    continue
                image_HWC = np.frombuffer(raw, np.uint8, offset=1).reshape(3, 32, 32).transpose(1, 2, 0)
                yield Record(quantise(image_HWC, self.layout.levels).tobytes(), raw[0])


def _fixed_records(path: Path, piece: Slice, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the records of `size` bytes that begin in a slice, each with its offset."""
    at = -(-piece.start // size) * size
    with open(path, "rb") as file:
        file.seek(at)
        while (piece.end is None or at < piece.end) and (raw := file.read(size)):
            yield at, raw
            at += size


class ImageSource(NamedFiles, PixelSource):
    """All .png and .jpeg files below a folder, sorted by path. The first folder of a relative path is the class.

    Folders that are named like a split, if every path has one, are not classes. If an image is outside of all
    sub-folders, no record has a class. Raises UserError when there are no images.
    """

    Config = ImageFolderConfig

    def __init__(self, config: ImageFolderConfig, length: int) -> None:
        self.path, self.on_size = Path(config.path), config.on_size
        self.name = Path(os.path.abspath(self.path)).name
        channels = {"rgb": 3, "grey": 1}[config.colour]
        super().__init__(
            config, length, GridLayout(config.image_size, config.image_size, channels, config.levels or 256)
        )
        self._split_by = config.split_by
        self._classes = _classes(self._found.files)
        folders = set(self._classes.values())
        self.labels = () if None in folders else tuple(sorted(filter(None, folders)))

    def _find(self) -> FoundFiles:
        return find_files(self.path, _FORMATS, remedy="give a folder of .png and .jpeg files")

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Yield images of one size and colour; drop unreadable files and those of more than 8 bits per channel."""
        index = {label: number for number, label in enumerate(self.labels)}
        for piece in part.slices:
            tally.read()
            content = self._read(self._found.files[piece.file], tally)
            if content is not None:
                folder = self._classes[piece.file]
                yield Record(content, index[folder] if folder is not None and index else None)

    def _read(self, path: Path, tally: Tally) -> bytes | None:
        image_module, operations = (optional(name, "source.name=images", "images") for name in _PILLOW)
        try:
            with reading(path, "picture"):
                pixels_HWC = self._pixels(path, image_module, operations)
        except _Unusable as error:
            tally.drop(error.reason, f"{path}: {error}")
            return None
        except UserError as error:
            tally.drop("not a readable picture", error)
            return None
        return quantise(pixels_HWC, self.layout.levels).tobytes()

    def _pixels(self, path: Path, image_module: Any, operations: Any) -> np.ndarray:
        size = (self.layout.width, self.layout.height)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF and palettes
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(path, formats=_FORMATS) as image:
                if image.mode not in _MODES:
                    raise _Unusable("not 8 bits a channel", f"mode {image.mode}")
                # In a JPEG with several pictures, the first is the photograph and the others are previews.
                if image.format == "PNG" and getattr(image, "is_animated", False):
                    raise _Unusable("an animation", f"{image.n_frames} frames")
                upright = _upright(image, image_module).convert("L" if self.layout.channels == 1 else "RGB")
            if upright.size != size and self.on_size == "drop":
                raise _Unusable("another size", f"{upright.width} x {upright.height}")
            fits = upright.size == size
            return np.asarray(upright if fits else operations.fit(upright, size, image_module.Resampling.LANCZOS))


class _Unusable(UserError):
    """A picture that is readable, but not used."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(found)
        self.reason = reason


def _upright(image: Any, image_module: Any) -> Any:
    """Turn an image as its EXIF says; EXIF that cannot be read is ignored, as viewers do.

    `PIL.ImageOps.exif_transpose` also writes the rest of EXIF again, which fails for tags of unexpected types.
    """
    image.load()
    turn = None
    with suppress(UserError), reading("EXIF", "table of tags"):
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    return image if turn is None else image.transpose(image_module.Transpose[turn])


def _classes(names: Iterable[str]) -> dict[str, str | None]:
    """Return the first folder of each path, after those of splits; None: there is none."""
    paths = {name: without_split(name) for name in names}
    if any(path == name for name, path in paths.items()):  # then a folder such as `test` is a class
        paths = {name: name for name in paths}
    return {name: path.split("/")[0] if "/" in path else None for name, path in paths.items()}


class DigitSource(PixelSource):
    """The 1,797 handwritten digits of 8 x 8 pixels and 17 levels in the PyPI package scikit-learn (BSD licence).

    These are the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
    """

    Config = DigitSourceConfig
    name = "digits"
    labels = tuple(map(str, range(10)))

    def __init__(self, config: DigitSourceConfig, length: int) -> None:
        super().__init__(config, length, GridLayout(8, 8, 1, config.levels or 17))

    def files(self) -> dict[str, Path]:
        """The table in the installed package. Raises UserError when it is missing."""
        path = package_folder("sklearn", "source.name=digits", "images") / "datasets" / "data" / _DIGITS_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing; `pip install --force-reinstall scikit-learn`")
        return {_DIGITS_FILE: path}

    def parts(self, part_bytes: int) -> list[Part]:
        """The whole table."""
        return cut_into_parts(self.files(), part_bytes)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Images with their labels."""
        for piece in part.slices:
            rows = np.loadtxt(self.files()[piece.file], np.uint8, delimiter=",", ndmin=2)
            assert rows.shape[1] == _DIGITS_COLUMNS
            for row in rows:
                tally.read()
                yield Record(quantise(row[:-1], self.layout.levels, source_levels=17).tobytes(), int(row[-1]))
