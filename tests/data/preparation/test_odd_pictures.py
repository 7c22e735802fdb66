"""Pictures and codes as people and attackers have them: read rightly, counted, or refused in one line."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from scmdm.cli import main
from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.records import Part, Slice, Tally

KEYS = ["source.name=images", "tokenizer.name=levels", "source.image_size=4", "length=49"]


@pytest.fixture(scope="module")
def module():
    return pytest.importorskip("data_prep.images")


def picture(seed, size=(4, 4), mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def fill(folder, count=30, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(1000 * seed + number).save(folder / f"{number:03}.png")


def prepare(empty_yaml, out, *keys):
    return main(["prepare", str(empty_yaml), f"out={out}", "workers=1", *keys])


def read(module, folder):
    """The records and the tally of a folder of pictures."""
    source = module.ImageSource(module.ImageFolderConfig(path=str(folder), image_size=4), length=49)
    tally = Tally()
    return [record for part in source.parts(1 << 20) for record in source.records(part, tally)], tally


def exif(orientation_type, value, extra=b""):
    """EXIF with the orientation as an entry of a type and 4 bytes of value, and more entries."""
    entries = struct.pack("<HHI4s", 0x0112, orientation_type, 1, value) + extra
    table = struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    return b"Exif\0\0II*\0\x08\0\0\0" + table


@pytest.mark.parametrize(
    ("block", "turned"),
    [
        (exif(3, b"\x06\0\0\0"), True),
        (exif(3, b"\x06\0\0\0", struct.pack("<HHI4s", 0x0100, 2, 4, b"wide")), True),  # a width that is text
        (exif(3, b"\x63\0\0\0"), False),
        (exif(2, b"6\0\0\0"), False),
        (exif(11, struct.pack("<f", 6.5)), False),
        (exif(12, b"\xff\xff\xff\x7f"), False),
        (exif(5, b"\xff\xff\xff\x7f"), False),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", False),
        (b"Exif\0\0", False),
        (b"Exif\0\0MM", False),
    ],
)
def test_broken_exif_is_ignored_and_a_readable_orientation_is_not(module, tmp_path, block, turned):
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    image.save(tmp_path / "a.jpg", exif=block, quality=100, subsampling=0)
    (record,), tally = read(module, tmp_path)
    pixels_HWC = np.frombuffer(record.content, np.uint8).reshape(4, 4, 3)
    bright_HW = pixels_HWC[..., 0] > 128
    assert tally.counts == {"read": 1}
    expected_HW = np.zeros((4, 4), bool)
    expected_HW[(slice(None), slice(2, 4)) if turned else slice(2)] = True
    assert (bright_HW == expected_HW).all()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, colour=2, data=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


UNREADABLE = "dropped: not a readable picture"
ANIMATED, DEEP = "dropped: an animation", "dropped: not 8 bits a channel"
ODD = {
    "empty.png": (b"", UNREADABLE),
    "text.jpg": (b"no picture", UNREADABLE),
    "truncated.jpg": (saved(picture(0, (64, 64)), "JPEG")[:900], UNREADABLE),
    "truncated.png": (saved(picture(0, (64, 64)), "PNG")[:900], UNREADABLE),
    "wide.png": (png(0, 4), UNREADABLE),
    "large.png": (png(1 << 31, 1 << 31), UNREADABLE),
    "bomb.png": (png(11_000, 11_000), UNREADABLE),  # Pillow alone would only warn
    "short.png": (png(4, 4, data=b"\0" * 5), UNREADABLE),
    "gif.png": (saved(picture(0), "GIF"), UNREADABLE),
    "tiff.jpg": (saved(picture(0), "TIFF"), UNREADABLE),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(x) print\n", UNREADABLE),
    "moving.png": (saved(picture(0), "PNG", save_all=True, append_images=[picture(1)]), ANIMATED),
    "deep.png": (saved(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"), DEEP),
    "comment.png": (
        png(4, 4, data=bytes(52))[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27))) + png(4, 4)[33:],
        UNREADABLE,
    ),
    "jpeg.png": (saved(picture(0), "JPEG"), None),
    "cmyk.jpg": (saved(picture(0, mode="CMYK"), "JPEG"), None),
    "grey.png": (saved(picture(0, mode="LA"), "PNG"), None),
    "bits.png": (saved(picture(0, mode="1"), "PNG"), None),
    "palette.png": (saved(picture(0, mode="P"), "PNG", transparency=b"\0" * 256), None),
    "narrow.png": (saved(picture(0, (1, 900)), "PNG"), None),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_read_or_counted(module, tmp_path, name):
    content, reason = ODD[name]
    (tmp_path / name).write_bytes(content)
    records, tally = read(module, tmp_path)
    assert tally.counts == {"read": 1, **({reason: 1} if reason else {})}
    assert [len(record.content) for record in records] == ([] if reason else [48])
    assert reason is None or str(tmp_path / name) in tally.places[reason][0]


WHOLE = {"JPEG": saved(picture(3, (16, 16)), "JPEG", exif=exif(3, b"\x06\0\0\0")), "PNG": saved(picture(3), "PNG")}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), format=st.sampled_from(sorted(WHOLE)))
def test_damage_of_a_picture_is_read_or_counted(module, tmp_path, data, format):
    damaged = bytearray(WHOLE[format])
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    (tmp_path / "a.png").write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    records, tally = read(module, tmp_path)
    assert len(records) + sum(n for name, n in tally.counts.items() if name != "read") == tally.counts["read"] == 1


def test_folders_of_splits_are_splits_and_no_classes(tmp_path, empty_yaml):
    for number, (split, label) in enumerate((s, c) for s in ("train", "valid", "test") for c in ("cat", "dog")):
        fill(tmp_path / "raw" / split / label / "deeper", 5, seed=number)
    assert prepare(empty_yaml, tmp_path / "out", *KEYS, f"source.path={tmp_path / 'raw'}") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.labels == ["cat", "dog"]
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 10,
        "validation": 10,
        "test": 10,
    }


def test_a_test_set_that_a_small_corpus_lacks_may_be_absent(tmp_path, empty_yaml):
    for number, split in enumerate(("train", "val")):
        fill(tmp_path / "raw" / split, 4, seed=number)
    keys = [*KEYS, f"source.path={tmp_path / 'raw'}", "test_fraction=0.000001"]
    assert prepare(empty_yaml, tmp_path / "out", *keys) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert list(manifest.splits) == ["train", "validation"] and manifest.labels == []


def test_a_class_may_be_called_like_a_split_and_hidden_files_are_no_pictures(module, tmp_path):
    for number, name in enumerate(("cat", "test", ".ipynb_checkpoints")):
        fill(tmp_path / name, 2, seed=number)
    (tmp_path / "cat" / "._000.png").write_bytes(b"AppleDouble")
    source = module.ImageSource(module.ImageFolderConfig(path=str(tmp_path), image_size=4), length=49)
    assert source.labels == ("cat", "test") and len(source.files()) == 4 and not source.published
    assert {name for names in source.skipped.values() for name in names} == {".ipynb_checkpoints", "cat/._000.png"}


def test_a_class_in_folders_of_splits_may_be_called_like_a_split(module, tmp_path):
    for number, name in enumerate(("train/train", "train/dog", "test/train", "lost+found", "@eaDir")):
        fill(tmp_path / name, 2, seed=number)
    source = module.ImageSource(module.ImageFolderConfig(path=str(tmp_path), image_size=4), length=49)
    assert source.labels == ("dog", "train") and source.published == ("test",)


def npy(array, order="C"):
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(array) if order == "F" else array, allow_pickle=True)
    return buffer.getvalue()


def header(text):
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode()


CODES = np.arange(120, dtype=np.int32).reshape(40, 3)
REFUSED = {
    "objects": npy(np.array([[{}]], dtype=object)),
    "structures": npy(np.zeros((2, 3), "i4,i4")),
    "numbers with points": npy(CODES.astype(np.float32)),
    "truth values": npy(CODES > 3),
    "one number": npy(np.int32(3)),
    "no codes": npy(np.zeros((4, 0), np.int32)),
    "no samples": npy(np.zeros((0, 3), np.int32)),
    "truncated": npy(CODES)[:-1],
    "longer": npy(CODES) + b"\0",
    "empty": b"",
    "text": b"1 2 3",
    "archive": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x04}.",
    "version": b"\x93NUMPY\x09\0" + npy(CODES)[8:],
    "huge": header("{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }\n"),
    "negative": header("{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 3), }\n"),
    "long header": header("{'descr': '<i4', 'fortran_order': False, 'shape': (" + "1, " * 9000 + ")}\n"),
    "nested header": header("(" * 9000 + ")" * 9000),
    "expression": header("{'descr': '<i4', 'fortran_order': False, 'shape': (1 + 1, 3), }\n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_codes_are_refused_by_name(tmp_path, empty_yaml, capsys, name):
    (tmp_path / "codes.npy").write_bytes(REFUSED[name])
    keys = ["source.name=codes", "source.levels=256", "tokenizer.name=codes", "length=4"]
    assert prepare(empty_yaml, tmp_path / "out", *keys, f"source.path={tmp_path / 'codes.npy'}") == 1
    assert name == "no samples" or "codes.npy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["u1", ">i4", "<u8", "i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_codes_of_any_integers_and_layout_are_the_same(tmp_path, dtype, order):
    from data_prep.codes import CodeSource, CodeSourceConfig

    array = CODES.reshape(20, 2, 3).astype(dtype)
    (tmp_path / "a.npy").write_bytes(npy(array, order))
    source = CodeSource(CodeSourceConfig(path=str(tmp_path), levels=256), length=7)
    records = list(source.records(Part((Slice("a.npy"),)), Tally()))
    assert b"".join(record.content for record in records) == CODES.astype("u1").tobytes()


def test_codes_outside_the_codebook_are_counted_and_splits_are_known_by_name(tmp_path, empty_yaml):
    for name, first in (("train", 0), ("val", 100), ("test", 200)):
        values = (np.arange(60).reshape(20, 3) + first).astype(np.int64)
        values[0] = {"train": -1, "val": 1 << 40, "test": 300}[name]
        (tmp_path / f"{name}.npy").write_bytes(npy(values))
    (tmp_path / ".hidden.npy").write_bytes(b"")
    keys = ["source.name=codes", "source.levels=260", "tokenizer.name=codes", "length=4"]
    assert prepare(empty_yaml, tmp_path / "out", *keys, f"source.path={tmp_path}") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.counts == {"read": 60, "kept": 57, "dropped: no such code": 3, "skipped: hidden": 1}
    assert read_split(tmp_path / "out", "test").min(initial=999, where=read_split(tmp_path / "out", "test") > 3) == 207
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["samples"] == 19
