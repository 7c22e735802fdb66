"""Pictures in MNIST's format: what is read equals what was written; damaged files and files that misfit are refused."""

import bz2
import gzip
import struct

import numpy as np
import pytest
import zstandard

from data_prep.idx_images import pooled, read_idx
from scmdm.cli import main
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import SPLITS
from scmdm.errors import UserError
from tests.data.preparation.test_source_images import as_set, pictures

KEYS = ["source.name=idx", "tokenizer.name=levels", "validation_fraction=0.2"]
COUNTS = {"train": 40, "t10k": 12}


def idx(values):
    """The bytes of an IDX file of unsigned bytes."""
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(folder, side=6, suffix="-idx{}-ubyte.gz"):
    """The four files with random pictures; returns labels and pictures by the files' first word."""
    dice = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for stem, count in COUNTS.items():
        pictures_NHW = dice.integers(0, 256, (count, side, side), np.uint8)
        labels_N = np.arange(count, dtype=np.uint8) % 3
        for kind, values in (("images", pictures_NHW), ("labels", labels_N)):
            name = f"{stem}-{kind}{suffix.format(values.ndim)}"
            (folder / name).write_bytes(gzip.compress(idx(values)) if name.endswith(".gz") else idx(values))
        found[stem] = labels_N, pictures_NHW
    return found


def prepare(empty_yaml, tmp_path, *keys):
    return main(
        ["prepare", str(empty_yaml), *KEYS, f"source.path={tmp_path / 'raw'}", f"out={tmp_path / 'data'}", *keys]
    )


@pytest.mark.parametrize("suffix", ["-idx{}-ubyte.gz", ".idx{}-ubyte", "-idx{}-ubyte"])
def test_the_published_sets_are_kept(tmp_path, empty_yaml, suffix):
    raw = write_mnist(tmp_path / "raw", suffix=suffix)
    assert prepare(empty_yaml, tmp_path, "length=37", "workers=1") == 0
    found = {split: pictures(tmp_path / "data", split) for split in SPLITS}
    written = {stem: as_set(zip(*values, strict=True)) for stem, values in raw.items()}
    assert as_set(found["test"]) == written["t10k"]
    assert as_set(found["train"] + found["validation"]) == written["train"] and found["validation"]
    assert list(Manifest.read(tmp_path / "data").labels) == ["0", "1", "2"]


def test_means_of_squares_and_fewer_levels(tmp_path, empty_yaml):
    raw = write_mnist(tmp_path / "raw")
    assert prepare(empty_yaml, tmp_path, "length=10", "source.pool=2", "source.levels=16", "workers=1") == 0
    labels_N, pictures_NHW = raw["t10k"]
    means_NHW = np.floor(pictures_NHW.reshape(-1, 3, 2, 3, 2).mean((2, 4)) + 0.5).astype(np.uint8)
    assert (np.stack([pooled(picture_HW, 2) for picture_HW in pictures_NHW]) == means_NHW).all()
    assert as_set(pictures(tmp_path / "data", "test")) == as_set(zip(labels_N, means_NHW // 16 * 17, strict=True))


def damaged(name, change):
    def apply(folder):
        path = folder / f"{name}.gz"
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))

    return apply


@pytest.mark.parametrize(
    ("damage", "keys", "named"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte.gz").unlink(), [], "t10k-labels"),
        (lambda folder: (folder / "train-images.old").touch(), [], "train-images.old"),
        (damaged("train-images-idx3-ubyte", lambda raw: raw[:-1]), [], "train-images-idx3-ubyte.gz"),
        (damaged("train-images-idx3-ubyte", lambda raw: raw + b"x"), [], "train-images-idx3-ubyte.gz"),
        (damaged("train-images-idx3-ubyte", lambda raw: b"\0\0\x0d" + raw[3:]), [], "00 00 0d 03"),
        (damaged("t10k-labels-idx1-ubyte", lambda raw: raw[:2]), [], "t10k-labels-idx1-ubyte.gz"),
        (damaged("t10k-labels-idx1-ubyte", lambda raw: idx(np.zeros(11, np.uint8))), [], "11 labels"),
        (damaged("t10k-images-idx3-ubyte", lambda raw: idx(np.zeros((12, 2, 2), np.uint8))), [], "2 x 2"),
        (damaged("train-labels-idx1-ubyte", lambda raw: idx(np.zeros(0, np.uint8))), [], "train-labels"),
        (lambda folder: (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bno"), [], "train-images"),
        (lambda folder: None, ["source.pool=4"], "source.pool=4"),
        (lambda folder: None, ["length=38"], "length=37"),
        (lambda folder: None, ["held_out_last=3"], "source.name=idx"),
        (lambda folder: None, ["split_seed=3"], "source.name=idx"),
    ],
)
def test_what_is_refused(tmp_path, empty_yaml, capsys, damage, keys, named):
    write_mnist(tmp_path / "raw")
    damage(tmp_path / "raw")
    assert prepare(empty_yaml, tmp_path, *(["length=37"] if not keys else ["length=37", *keys])) == 1
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1, error
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("suffix", "compress"), [(".zst", zstandard.compress), (".bz2", bz2.compress)])
def test_files_whose_first_compressed_block_is_long(tmp_path, suffix, compress):
    """Decompressors yield nothing before it is complete: random pixels make it longer than what is read at once."""
    pictures_NHW = np.random.default_rng(0).integers(0, 100, (1000, 28, 28), np.uint8)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(compress(idx(pictures_NHW)))
    assert (read_idx(path, 3) == pictures_NHW).all()


def test_a_header_that_promises_too_much_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**31, 28, 28))
    with pytest.raises(UserError):
        read_idx(path, 3)


@pytest.mark.slow
def test_fashion_mnist_comes_from_its_package(tmp_path, monkeypatch):
    from data_prep.idx_images import IdxSource, IdxSourceConfig
    from scmdm.data.preparation.records import Tally

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, tally = IdxSource(IdxSourceConfig(pool=2), length=197), Tally()
    test = [record.label for record in source.records(source.parts(1)[1], tally)]
    assert [test.count(label) for label in range(10)] == [1000] * 10 and source.labels[9] == "Ankle boot"
