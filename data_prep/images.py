"""Pictures as levels of pixels: CIFAR-10's binary version, folders of PNG and JPEG, scikit-learn's digits.

A record is the bytes of one picture, row by row from the top left, the channels of a pixel side by side.

Legend: N pictures, H height, W width, C channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.records import Part, Record, Slice, Tally, cut_into_parts
from scmdm.data.tokenizers import Layout
from scmdm.errors import UserError

_CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_BYTES = 1 + 3 * 32 * 32  # of a record: label, red, green and blue plane
_CIFAR10_TRAIN, _CIFAR10_TEST = tuple(f"data_batch_{n}.bin" for n in range(1, 6)), ("test_batch.bin",)
_SUFFIXES = (".png", ".jpg", ".jpeg")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's, of 8 bits a channel and fewer
_DIGITS_FILE, _DIGITS_COLUMNS = "digits.csv.gz", 8 * 8 + 1


def check_length(config: PrepareConfig, layout: Layout) -> None:
    """UserError unless the key `length` is that of the source's sequences: all have the same."""
    if config.length != layout.length:
        raise UserError(
            f"length={config.length} is not possible; samples of source={config.source} have {layout.values} values "
            f"behind [BOS]: set length={layout.length}"
        )


def quantise(pixels: np.ndarray, levels: int, of: int = 256) -> np.ndarray:
    """Levels below `levels` of uint8 levels below `of`, in steps of the same size."""
    return (pixels.astype(np.uint16) * levels // of).astype(np.uint8)


class Cifar10:
    """CIFAR-10 (Krizhevsky 2009), binary version: published training and test set; validation out of the training set.

    The version for Python is not read: to unpickle a file is to run what is in it.
    """

    name = "cifar10"
    whole_records = True
    published: tuple[str, ...] = ("train", "test")
    labels: tuple[str, ...] = _CIFAR10_LABELS

    def __init__(self, path: Path, levels: int = 256) -> None:
        self.path = path
        self.layout = Layout(32, 32, 3, levels)

    @classmethod
    def of(cls, config: PrepareConfig) -> Cifar10:
        """As the keys path and levels say. Raises UserError for another length."""
        source = cls(Path(str(config.path)), config.levels or 256)
        check_length(config, source.layout)
        return source

    def files(self) -> dict[str, Path]:
        """The six files; UserError when one is missing or is not of whole records."""
        files = {name: self.path / name for name in (*_CIFAR10_TRAIN, *_CIFAR10_TEST)}
        for path in files.values():
            if not path.is_file():
                raise UserError(
                    f"{path} is missing; give the folder of CIFAR-10's binary version as path=.../cifar-10-batches-bin"
                )
            size = path.stat().st_size
            if size == 0 or size % _CIFAR10_BYTES:
                raise UserError(
                    f"{path} has {size} bytes, which are not whole records of {_CIFAR10_BYTES}; fetch the binary "
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
        """Pictures with their labels; a record whose label is none is left out."""
        files = self.files()
        for piece in part.slices:
            for at, raw in _fixed_records(files[piece.file], piece, _CIFAR10_BYTES):
                tally.read()
                if raw[0] >= len(self.labels):
                    tally.drop("no such label", f"{files[piece.file]} at byte {at}: label {raw[0]}")
                    continue
                picture_HWC = np.frombuffer(raw, np.uint8, offset=1).reshape(3, 32, 32).transpose(1, 2, 0)
                yield Record(quantise(picture_HWC, self.layout.levels).tobytes(), raw[0])


def _fixed_records(path: Path, piece: Slice, size: int) -> Iterator[tuple[int, bytes]]:
    """The records of so many bytes that begin in a slice, each with its offset."""
    at = -(-piece.start // size) * size
    with open(path, "rb") as file:
        file.seek(at)
        while (piece.end is None or at < piece.end) and (raw := file.read(size)):
            yield at, raw
            at += size


class ImageFolder:
    """All .png and .jpeg below a folder, sorted by path; those of a sub-folder are the class of its name.

    Pictures directly in the folder beside sub-folders would have no class: then nothing has one. Raises UserError when
    there is none at all.
    """

    whole_records = True
    published: tuple[str, ...] = ()

    def __init__(self, path: Path, layout: Layout, on_size: str = "crop") -> None:
        self.layout, self.on_size = layout, on_size
        self.name = path.resolve().name
        self._files = _image_files(path)
        folders = {_class_of(name) for name in self._files}
        self.labels: tuple[str, ...] = () if None in folders else tuple(sorted(filter(None, folders)))

    @classmethod
    def of(cls, config: PrepareConfig) -> ImageFolder:
        """As the keys path, image_size, colour, levels and on_size say. Raises UserError for another length."""
        assert config.image_size is not None
        channels = {"rgb": 3, "grey": 1}[config.colour]
        layout = Layout(config.image_size, config.image_size, channels, config.levels or 256)
        check_length(config, layout)
        return cls(Path(str(config.path)), layout, config.on_size)

    def files(self) -> dict[str, Path]:
        """By path below the folder."""
        return self._files

    def parts(self, part_bytes: int) -> list[Part]:
        """Files together."""
        return cut_into_parts(self.files(), part_bytes)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Pictures in one size and colour; what cannot be read, or is of more than 8 bits a channel, is left out."""
        index = {label: number for number, label in enumerate(self.labels)}
        for piece in part.slices:
            tally.read()
            content = self._read(self._files[piece.file], tally)
            if content is not None:
                folder = _class_of(piece.file)
                yield Record(content, index[folder] if folder is not None and index else None)

    def _read(self, path: Path, tally: Tally) -> bytes | None:
        size = (self.layout.width, self.layout.height)
        try:
            with Image.open(path) as image:
                if image.mode not in _MODES:
                    tally.drop("not 8 bits a channel", path)
                    return None
                upright = ImageOps.exif_transpose(image).convert("L" if self.layout.channels == 1 else "RGB")
        # SyntaxError is what Pillow calls a broken PNG.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            tally.drop("not a readable picture", path)
            return None
        if upright.size != size and self.on_size == "drop":
            tally.drop("another size", f"{path}: {upright.width} x {upright.height}")
            return None
        fitted = upright if upright.size == size else ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
        return quantise(np.asarray(fitted), self.layout.levels).tobytes()


def _image_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"path={folder} is no folder; give a folder of .png and .jpeg files")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"path={folder} holds no .png or .jpeg file; give a folder that does")
    return {path.relative_to(folder).as_posix(): path for path in found}


def _class_of(name: str) -> str | None:
    folder, slash, _ = name.partition("/")
    return folder if slash else None


class Digits:
    """The 1,797 handwritten digits of 8 x 8 pixels and 17 levels in the PyPI package scikit-learn (BSD licence).

    They are the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
    """

    name = "digits"
    whole_records = True
    published: tuple[str, ...] = ()
    labels: tuple[str, ...] = tuple(map(str, range(10)))

    def __init__(self, levels: int = 17) -> None:
        self.layout = Layout(8, 8, 1, levels)

    @classmethod
    def of(cls, config: PrepareConfig) -> Digits:
        """As the key levels says. Raises UserError for another length."""
        source = cls(config.levels or 17)
        check_length(config, source.layout)
        return source

    def files(self) -> dict[str, Path]:
        """The table in the installed package; UserError when it is not installed."""
        spec = importlib.util.find_spec("sklearn")
        if spec is None or not spec.submodule_search_locations:
            raise UserError("source=digits needs the package scikit-learn; `pip install scikit-learn`")
        path = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data" / _DIGITS_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing; `pip install --force-reinstall scikit-learn`")
        return {_DIGITS_FILE: path}

    def parts(self, part_bytes: int) -> list[Part]:
        """The table."""
        return cut_into_parts(self.files(), part_bytes)

    def records(self, part: Part, tally: Tally) -> Iterator[Record]:
        """Pictures with their labels."""
        for piece in part.slices:
            rows = np.loadtxt(self.files()[piece.file], np.uint8, delimiter=",", ndmin=2)
            assert rows.shape[1] == _DIGITS_COLUMNS
            for row in rows:
                tally.read()
                yield Record(quantise(row[:-1], self.layout.levels, of=17).tobytes(), int(row[-1]))
