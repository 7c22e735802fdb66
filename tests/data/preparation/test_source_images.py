"""Pictures and codes: sources, splits, the tokenizer, mirror images; damaged and misfit files refused or counted."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scmdm.cli import main
from scmdm.data.loader import read_labels, read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import SPLITS
from scmdm.data.tokenizers import GridLayout, LevelTokenizer, UnknownSymbol, is_framed, load_tokenizer
from scmdm.data.verification import verify_dataset
from scmdm.errors import UserError
from tests.conftest import ROOT
from tests.data.preparation.test_prepare import files

CIFAR = ["source.name=cifar10", "tokenizer.name=levels", "length=3073", "validation_fraction=0.3", "deduplicate=false"]


def write_cifar10(folder, per_batch=20, seed=0):
    """The six files of the binary version with random pictures; returns labels and pictures (N, 32, 32, 3) by split."""
    dice = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = {"train": [], "test": []}
    for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        labels_N = dice.integers(0, 10, per_batch, np.uint8)
        planes_NCHW = dice.integers(0, 256, (per_batch, 3, 32, 32), np.uint8)
        records = np.concatenate([labels_N[:, None], planes_NCHW.reshape(per_batch, -1)], axis=1)
        (folder / name).write_bytes(records.tobytes())
        pictures = planes_NCHW.transpose(0, 2, 3, 1)
        found["test" if name == "test_batch.bin" else "train"] += zip(labels_N.tolist(), pictures, strict=True)
    return found


def prepare(empty_yaml, out, *keys):
    return main(["prepare", str(empty_yaml), f"out={out}", "workers=1", *keys])


def pictures(root, split):
    """Labels (or None) and pictures of a split, in its order."""
    manifest = Manifest.read(root)
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    ids_NL = read_split(root, split)
    assert all(is_framed(row, tokenizer, manifest.padding_id) for row in ids_NL.tolist())
    labels = read_labels(root, split) if manifest.labels else [None] * len(ids_NL)
    return list(zip(labels, tokenizer.pictures(ids_NL), strict=True))


def as_set(found):
    return {(None if label is None else int(label), picture.tobytes()) for label, picture in found}


def test_cifar10_keeps_the_published_sets(tmp_path, empty_yaml):
    raw = write_cifar10(tmp_path / "raw")
    # One part for each file, and parts that end within a record.
    for part in ("part_mb=64", "part_mb=1"):
        out = tmp_path / part
        assert prepare(empty_yaml, out, *CIFAR, f"source.path={tmp_path / 'raw'}", part) == 0
        assert not verify_dataset(out)
        found = {split: pictures(out, split) for split in SPLITS}
        assert as_set(found["test"]) == as_set(raw["test"]) and len(found["test"]) == 20
        assert as_set(found["train"] + found["validation"]) == as_set(raw["train"])
        assert len(found["train"]) + len(found["validation"]) == 100 and 10 < len(found["validation"]) < 50
        manifest = Manifest.read(out)
        assert manifest.labels[0] == "airplane" and manifest.length == 3073 and manifest.vocab_size == 260
        # [BOS] is given, and there is no end mark: the likelihood is over the values alone.
        assert manifest.splits["test"].tokens == 20 * 3072


def test_parts_that_end_within_a_record_lose_and_repeat_nothing(tmp_path):
    from data_prep.images import Cifar10Config, Cifar10Source
    from scmdm.data.preparation.records import Tally

    write_cifar10(tmp_path)
    source = Cifar10Source(Cifar10Config(path=str(tmp_path)), length=3073)
    whole = [record for part in source.parts(1 << 30) for record in source.records(part, Tally())]
    parts = source.parts(5000)
    assert len(parts) > 50 and {part.split for part in parts} == {"train", "test"}
    assert [record for part in parts for record in source.records(part, Tally())] == whole
    assert len(whole) == 120


def test_flips_add_mirror_images_to_the_training_split_only(tmp_path, empty_yaml):
    raw = write_cifar10(tmp_path / "raw")
    assert prepare(empty_yaml, tmp_path / "data", *CIFAR, f"source.path={tmp_path / 'raw'}", "source.flips=true") == 0
    found = {split: pictures(tmp_path / "data", split) for split in SPLITS}
    train = found["train"]
    originals, mirrored = train[::2], train[1::2]
    for (label, picture), (same, mirror) in zip(originals, mirrored, strict=True):
        assert label == same and (picture[:, ::-1] == mirror).all() and (picture != mirror).any()
    assert as_set(originals + found["validation"]) == as_set(raw["train"])
    assert as_set(found["test"]) == as_set(raw["test"])
    assert Manifest.read(tmp_path / "data").counts["mirrored"] == len(originals)


def test_fewer_levels(tmp_path, empty_yaml):
    raw = write_cifar10(tmp_path / "raw")
    assert prepare(empty_yaml, tmp_path / "data", *CIFAR, f"source.path={tmp_path / 'raw'}", "source.levels=16") == 0
    assert Manifest.read(tmp_path / "data").vocab_size == 20
    expected = {(label, (picture // 16 * 17).tobytes()) for label, picture in raw["test"]}
    assert as_set(pictures(tmp_path / "data", "test")) == expected


def truncate(folder):
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-100])


def relabel(folder):
    path = folder / "data_batch_3.bin"
    raw = bytearray(path.read_bytes())
    raw[2 * 3073] = 77
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "keys", "message"),
    [
        (lambda folder: (folder / "test_batch.bin").unlink(), [], "test_batch.bin is missing"),
        (truncate, [], "data_batch_3.bin has 61360 bytes, not a multiple of a record's 3073"),
        (lambda folder: (folder / "data_batch_1.bin").write_bytes(b""), [], "data_batch_1.bin has 0 bytes"),
        (relabel, ["on_dirty=refuse"], "data_batch_3.bin at byte 6146: label 77: no such label"),
        (lambda folder: None, ["length=3074"], "length=3074 is not possible; .* set length=3073"),
        (
            lambda folder: None,
            ["source.levels=300"],
            "source.levels=300 is not possible",
        ),
        (lambda folder: None, ["tokenizer.name=smiles"], "tokenizer.name='smiles' is not possible"),
        (
            lambda folder: None,
            ["source.image_size=32"],
            "unknown key `source.image_size`",
        ),
    ],
)
def test_damaged_and_misconfigured_cifar10_is_refused(tmp_path, empty_yaml, capsys, damage, keys, message):
    write_cifar10(tmp_path / "raw")
    damage(tmp_path / "raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        assert prepare(empty_yaml, tmp_path / "data", *CIFAR, f"source.path={tmp_path / 'raw'}", *keys) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1 and not (tmp_path / "data").exists()


def test_a_wrong_label_is_counted(tmp_path, empty_yaml):
    write_cifar10(tmp_path / "raw")
    relabel(tmp_path / "raw")
    assert prepare(empty_yaml, tmp_path / "data", *CIFAR, f"source.path={tmp_path / 'raw'}") == 0
    counts = Manifest.read(tmp_path / "data").counts
    assert counts == {"read": 120, "kept": 119, "dropped: no such label": 1}


def test_the_shipped_cifar10_configuration(tmp_path):
    write_cifar10(tmp_path / "raw", per_batch=100)
    config = str(ROOT / "configs/data/cifar10.yaml")
    keys = [f"source.path={tmp_path / 'raw'}", f"out={tmp_path / 'data'}", "workers=1", "validation_fraction=0.1"]
    assert main(["prepare", config, *keys]) == 0
    manifest = Manifest.read(tmp_path / "data")
    assert manifest.splits["train"].samples == 2 * (500 - manifest.splits["validation"].samples)


def test_the_published_cifar10_configuration(tmp_path):
    """All training pictures and no validation split."""
    write_cifar10(tmp_path / "raw", per_batch=20)
    config = str(ROOT / "configs/data/cifar10_published.yaml")
    assert main(["prepare", config, f"source.path={tmp_path / 'raw'}", f"out={tmp_path / 'data'}", "workers=1"]) == 0
    manifest = Manifest.read(tmp_path / "data")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 200, "test": 20}


def test_digits(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    config = str(ROOT / "configs/data/digits.yaml")
    assert main(["prepare", config, f"out={tmp_path / 'data'}", "workers=1"]) == 0
    values, labels = datasets.load_digits(return_X_y=True)
    expected = {(int(label), row.astype(np.uint8).tobytes()) for row, label in zip(values, labels, strict=True)}
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer.json")
    ids_NL = np.concatenate([read_split(tmp_path / "data", split) for split in SPLITS])
    own_labels = np.concatenate([read_labels(tmp_path / "data", split) for split in SPLITS])
    own = tokenizer.values(ids_NL).astype(np.uint8)
    assert {(int(label), row.tobytes()) for row, label in zip(own, own_labels, strict=True)} == expected
    assert len(ids_NL) == 1797 and tokenizer.pictures(ids_NL).max() == 255


def test_digits_without_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["prepare", str(ROOT / "configs/data/digits.yaml"), f"out={tmp_path / 'data'}", "workers=1"]) == 1
    assert "pip install 'scmdm[images]'" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    """Two classes of pictures in several formats and sizes, and what is none."""
    dice = np.random.default_rng(0)
    for number in range(30):
        place = tmp_path / "pictures" / ("cats" if number % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 256, (8, 8, 3), np.uint8)).save(place / f"{number:02}.png")
    cats = tmp_path / "pictures/cats"
    Image.fromarray(dice.integers(0, 256, (16, 24, 3), np.uint8)).save(cats / "large.jpeg")
    Image.fromarray(dice.integers(0, 256, (8, 8), np.uint8)).save(cats / "grey.PNG")
    Image.fromarray(dice.integers(0, 65536, (8, 8), np.uint16)).save(cats / "deep.png")
    (cats / "broken.png").write_bytes((cats / "01.png").read_bytes()[:80])
    (cats / "text.jpg").write_text("no picture")
    (cats / "notes.txt").write_text("left alone")
    return tmp_path / "pictures"


FOLDER = [
    "source.name=images",
    "tokenizer.name=levels",
    "source.image_size=8",
    "validation_fraction=0.2",
    "test_fraction=0.2",
]
DIRT = {"dropped: not 8 bits a channel": 1, "dropped: not a readable picture": 2}


def test_a_folder_of_pictures(folder, tmp_path, empty_yaml):
    assert prepare(empty_yaml, tmp_path / "data", *FOLDER, f"source.path={folder}", "length=193") == 0
    manifest = Manifest.read(tmp_path / "data")
    assert manifest.counts == {"read": 35, "kept": 32, "skipped: other suffix": 1, **DIRT}
    assert manifest.labels == ["cats", "dogs"]
    found = as_set([row for split in SPLITS for row in pictures(tmp_path / "data", split)])
    small = sorted(folder.glob("*/[0-3]?.png"))
    expected = {(int(path.parent.name == "dogs"), np.asarray(Image.open(path)).tobytes()) for path in small}
    assert expected < found and len(found) == 32


def test_grey_pictures_and_sizes_that_are_dropped(folder, tmp_path, empty_yaml):
    keys = [f"source.path={folder}", "length=65", "source.colour=grey", "source.on_size=drop"]
    assert prepare(empty_yaml, tmp_path / "data", *FOLDER, *keys) == 0
    manifest = Manifest.read(tmp_path / "data")
    left_out = {"dropped: another size": 1, "skipped: other suffix": 1, **DIRT}
    assert manifest.counts == {"read": 35, "kept": 31, **left_out}
    found = as_set([row for split in SPLITS for row in pictures(tmp_path / "data", split)])
    assert (0, np.asarray(Image.open(folder / "cats/grey.PNG")).tobytes()) in found


def test_large_pictures_are_scaled_and_cropped_in_the_middle(tmp_path, empty_yaml):
    """Left and right quarters of a wide picture go; the rest is halved."""
    columns = np.repeat(np.array([0, 0, 80, 80, 160, 160, 255, 255], np.uint8), 4)
    wide_HW = np.tile(columns, (16, 1))
    (tmp_path / "a").mkdir()
    for number in range(12):
        Image.fromarray(wide_HW ^ np.uint8(number)).save(tmp_path / "a" / f"{number}.png")
    keys = [*FOLDER, f"source.path={tmp_path / 'a'}", "length=65", "source.colour=grey"]
    assert prepare(empty_yaml, tmp_path / "data", *keys) == 0
    assert Manifest.read(tmp_path / "data").labels == []
    found = [picture for split in SPLITS for _, picture in pictures(tmp_path / "data", split)]
    assert all(abs(int(p[4, 1, 0]) - 80) < 16 and abs(int(p[4, 6, 0]) - 160) < 16 for p in found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["source.path=/nonexistent/pictures", "length=193"], "source.path=/nonexistent/pictures"),
        (["source.path={empty}", "length=193"], "/empty"),
        (["source.path={folder}", "length=192"], "set length=193"),
        (["source.path={folder}", "length=193", "source.image_size=null"], "source.image_size=null"),
        (["source.path={folder}", "length=193", "source.colour=sepia"], "one of rgb, grey"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, empty_yaml, capsys, keys, message):
    (tmp_path / "empty").mkdir()
    keys = [key.format(folder=folder, empty=tmp_path / "empty") for key in keys]
    assert prepare(empty_yaml, tmp_path / "data", *FOLDER, *keys) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "data").exists()


CODES = ["source.name=codes", "tokenizer.name=codes", "length=17", "validation_fraction=0.2", "test_fraction=0.2"]


@pytest.mark.parametrize("levels", [200, 5000, 70000])
def test_codes(tmp_path, empty_yaml, levels):
    """Of one, two and four bytes."""
    codes_NL = np.random.default_rng(0).integers(0, levels, (60, 16))
    codes_NL[7, 3], codes_NL[8, 3] = levels, -1
    (tmp_path / "codes").mkdir()
    np.save(tmp_path / "codes/a.npy", codes_NL[:40])
    np.save(tmp_path / "codes/b.npy", codes_NL[40:].astype(np.int32))
    assert (
        prepare(empty_yaml, tmp_path / "data", *CODES, f"source.path={tmp_path / 'codes'}", f"source.levels={levels}")
        == 0
    )
    manifest = Manifest.read(tmp_path / "data")
    assert manifest.counts == {"read": 60, "kept": 58, "dropped: no such code": 2}
    assert manifest.dtype == ("uint16" if levels < 65000 else "uint32")
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer.json")
    ids_NL = np.concatenate([read_split(tmp_path / "data", split) for split in SPLITS])
    whole = np.delete(codes_NL, [7, 8], axis=0)
    assert sorted(tokenizer.values(ids_NL).tolist()) == sorted(whole.tolist())
    with pytest.raises(UserError, match="with the model that encoded them"):
        tokenizer.pictures(ids_NL)


def test_codes_that_are_refused(tmp_path, empty_yaml, capsys):
    path = tmp_path / "codes.npy"
    keys = [*CODES, f"source.path={path}", "source.levels=9"]
    for content, message in (
        (np.zeros((4, 16)), "holds float64 of shape (4, 16)"),
        (np.zeros(16, int), "of shape (16,)"),
        (np.array([{}], object), "codes.npy holds object"),
        (np.zeros((4, 20), int), "set length=21"),
    ):
        np.save(path, content, allow_pickle=True)
        assert prepare(empty_yaml, tmp_path / "data", *keys) == 1
        assert message in capsys.readouterr().err
    path.write_bytes(b"no array")
    assert prepare(empty_yaml, tmp_path / "data", *keys) == 1
    assert "codes.npy" in capsys.readouterr().err
    np.save(path, np.zeros((4, 16), int))
    assert prepare(empty_yaml, tmp_path / "data", *CODES, f"source.path={path}") == 1
    assert "key `source.levels` is not set" in capsys.readouterr().err
    assert prepare(empty_yaml, tmp_path / "data", *keys, "source.flips=true") == 1
    assert "unknown key `source.flips`" in capsys.readouterr().err


@given(st.integers(2, 256), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]), st.randoms())
def test_any_picture_comes_back(levels, height, width, channels, dice):
    layout = GridLayout(height, width, channels, levels)
    tokenizer = LevelTokenizer(layout)
    values = [dice.randrange(levels) for _ in range(layout.values)]
    ids = tokenizer.frame(tokenizer.encode(bytes(values)))
    assert len(ids) == layout.length and tokenizer.is_framed(ids)
    assert tokenizer.values(np.array([ids]))[0].tolist() == values
    picture = tokenizer.picture(ids)
    assert picture.shape == (height, width, channels) and picture.dtype == np.uint8
    assert picture.ravel().tolist() == [(255 * v * 2 + levels - 1) // (2 * (levels - 1)) for v in values]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids[1:]
    assert layout.mirrored(layout.mirrored(bytes(values))) == bytes(values)


@pytest.mark.parametrize("wrong", [[1, 4, 5, 6, 3], [1, 4, 5, 6, 0], [1, 4, 5, 6, 2], [4, 4, 5, 6, 7], [1, 4, 5, 6]])
def test_what_is_no_picture_is_not_framed(wrong):
    """The mask, padding, an end mark, no beginning, a value too few."""
    tokenizer = LevelTokenizer(GridLayout(2, 2, 1, 5))
    assert is_framed([1, 4, 5, 6, 7], tokenizer, 0) and not is_framed(wrong, tokenizer, 0)
    assert tokenizer.picture([1, 4, 8, 3, 7]).ravel().tolist() == [0, 255, 0, 191]
    assert tokenizer.tokens([1, 4, 3]) == ["[BOS]", "0", "[MASK]"]
    with pytest.raises(UserError, match="length=7 does not fit images of 2 x 2 x 1"):
        tokenizer.picture([1, 4, 5, 6, 7, 8, 8])


def test_prompts_and_files_of_the_tokenizer(tmp_path):
    tokenizer = LevelTokenizer(GridLayout(2, 3, 1, 5))
    assert tokenizer.encode("0 4\n2") == [4, 8, 6]
    for text in ("5", "-1", "two", "²"):
        with pytest.raises(UnknownSymbol):
            tokenizer.encode(text)
    path = tokenizer.save(tmp_path)
    assert load_tokenizer(path).layout == tokenizer.layout
    content = json.loads(path.read_text())
    for damaged in ({**content, "height": 0}, {**content, "depth": 1}, {**content, "width": "3"}, {"kind": "levels"}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=re.escape("tokenizer.json")):
            load_tokenizer(path)


def test_two_preparations_of_pictures_are_byte_identical(folder, tmp_path, empty_yaml):
    keys = [*FOLDER, f"source.path={folder}", "length=193", "source.flips=true"]
    for out in ("a", "b"):
        assert prepare(empty_yaml, tmp_path / out, *keys) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
