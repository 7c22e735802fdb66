"""Compressed shards: the same samples, decompressed once and only where they are read; damaged and hostile ones."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard

from scmdm.cli import main
from scmdm.config.data import DataConfig
from scmdm.data import shard_files
from scmdm.data.loader import build_loader, read_split
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture, open_data
from scmdm.data.remote import upload_dataset
from scmdm.data.shard_compression import decompressed
from scmdm.data.shard_files import disk_needs
from scmdm.data.shard_index import read_index
from scmdm.data.verification import verify_dataset
from scmdm.errors import UserError
from tests.data.sets import write_texts
from tests.distributed.launching import launch

SAMPLES = 480


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("sets") / "texts", SAMPLES)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The same samples, in six compressed shards."""
    return write_texts(tmp_path_factory.mktemp("compressed") / "texts", SAMPLES, compression="zstd")


@pytest.fixture
def data(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "data")
    return tmp_path / "data"


def shards(root, split="train"):
    return sorted(path.name for path in (root / split).glob("*.mds"))


def stored(root, split="train"):
    return sorted(path.name for path in (root / split).glob("*.mds.zstd"))


def reader(data, **options):
    keys = {"batch_size": 16, "shuffle": True, "seed": 0, "drop_last": False, "shuffle_block": 100}
    return build_loader(data, "train", **{**keys, **options})


def samples(data, **options):
    batches = list(reader(data, **options))
    return [torch.cat([batch[name] for batch in batches]).tolist() for name in ("index", "tokens")]


def refusal(read, *arguments):
    try:
        read(*arguments)
    except UserError as error:
        return str(error).replace("\n", " NEWLINE ")
    return None


def test_the_samples_are_those_of_the_uncompressed_data_set(plain, data):
    assert not shards(data) and len(stored(data)) == len(shards(plain)) > 2
    assert verify_dataset(data) == [] and not shards(data)
    sizes = [sum(file.bytes for file in Manifest.read(root).splits["train"].files[1:]) for root in (data, plain)]
    assert sizes[0] < sizes[1]
    assert samples(DataMixture.at(data)) == samples(DataMixture.at(plain))
    assert shards(data) == shards(plain)
    assert not shards(data, "validation")
    assert verify_dataset(data) == []
    assert samples(DataMixture.at(data), num_workers=1) == samples(DataMixture.at(plain))


def test_rows_decompress_only_their_shards(plain, data):
    rows = [0, SAMPLES - 1]
    assert np.array_equal(read_split(data, "train", rows), read_split(plain, "train", rows))
    names = shards(plain)
    assert shards(data) == [names[0], names[-1]]
    needed, wanted = disk_needs(data, Manifest.read(data))
    assert 0 < needed < wanted
    for split in ("train", "validation", "test"):
        assert np.array_equal(read_split(data, split), read_split(plain, split))
    assert disk_needs(data, Manifest.read(data)) == disk_needs(plain, Manifest.read(plain)) == (0, 0)


def prepare(out, *keys):
    source = ["source.name=qm9", "tokenizer.name=smiles", "length=32", "limit=200"]
    out.parent.joinpath("empty.yaml").write_text("{}\n")
    return main(["prepare", str(out.parent / "empty.yaml"), f"out={out}", *source, *keys])


def test_prepare(tmp_path, capsys):
    assert prepare(tmp_path / "plain") == 0
    assert prepare(tmp_path / "one", "compression=zstd:19") == prepare(tmp_path / "two", "compression=zstd:19") == 0
    one, two = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and "train/shard.00000.mds.zstd" in one
    assert Manifest.read(tmp_path / "one").source["options"]["compression"] == "zstd:19"
    assert "compression" not in Manifest.read(tmp_path / "plain").source["options"]
    for split in ("train", "validation", "test"):
        assert np.array_equal(read_split(tmp_path / "one", split), read_split(tmp_path / "plain", split))
    inode = (tmp_path / "one").stat().st_ino
    assert prepare(tmp_path / "one", "compression=zstd:19") == 0 and (tmp_path / "one").stat().st_ino == inode
    assert main(["prepare", "--verify", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert prepare(tmp_path / "one") == 1
    assert str(tmp_path / "one") in capsys.readouterr().err


@pytest.mark.parametrize("value", ["zstd:0", "zstd:23", "zstd:-1", "zstd:", "gz", "br:11", "ZSTD", "zstd:03", "zstd\n"])
def test_other_compressions_are_refused(tmp_path, capsys, value):
    assert prepare(tmp_path / "data", f"compression='{value}'") == 1
    error = capsys.readouterr().err
    assert "compression" in error and error.count("\n") == 1 and not (tmp_path / "data").exists()


def test_shards_that_the_compressor_cannot_take_are_refused(tmp_path, capsys):
    assert prepare(tmp_path / "data", "compression=zstd", "shard_mb=2048") == 1
    assert "shard_mb=2048" in capsys.readouterr().err


def test_a_cache_downloads_the_compressed_and_keeps_the_decompressed(s3, plain, packed, tmp_path, downloads):
    upload_dataset(packed, "s3://bucket/compressed")
    config = DataConfig(path=str(tmp_path / "cache"), remote="s3://bucket/compressed")
    loader = reader(open_data(config), cache_limit="1mb")
    downloads.clear()
    assert [batch["tokens"].tolist() for batch in loader] == [
        b["tokens"].tolist() for b in reader(DataMixture.at(plain))
    ]
    files = {f.file: f.bytes for f in Manifest.read(packed).splits["train"].files if f.file.endswith(".zstd")}
    assert sorted(downloads) == sorted(files.items())
    assert shards(tmp_path / "cache") == shards(plain) and not stored(tmp_path / "cache")
    usage = sum((tmp_path / "cache/train" / name).stat().st_size for name in [*shards(plain), "index.json"])
    assert loader.dataset.cache_usage == usage
    assert verify_dataset(tmp_path / "cache") == []


def test_a_limited_cache_removes_and_fetches_shards(tmp_path, downloads, monkeypatch):
    plain = write_texts(tmp_path / "plain", 3 * SAMPLES)
    packed = write_texts(tmp_path / "packed", 3 * SAMPLES, compression="zstd")
    config = DataConfig(path=str(tmp_path / "cache"), remote=str(packed))
    largest = max(shard.raw_data.bytes + shard.zip_data.bytes for shard in read_index_of(packed).shards)
    limit = (packed / "train/index.json").stat().st_size + 4 * largest
    sizes, decompress = [], shard_files.decompress_file

    def measured(*given):
        """The cache is largest when a shard is decompressed, and its downloaded file is still there."""
        decompress(*given)
        sizes.append(bytes_below(tmp_path / "cache/train"))

    monkeypatch.setattr(shard_files, "decompress_file", measured)
    loader = reader(open_data(config), cache_limit=f"{limit}b")
    unlimited = reader(DataMixture.at(plain))
    downloads.clear()
    for _ in range(3):
        assert [batch["index"].tolist() for batch in loader] == [batch["index"].tolist() for batch in unlimited]
    assert len(downloads) > len(shards(plain)) and not stored(tmp_path / "cache")
    # Streaming counts a shard when it is there, and two threads fetch: each may have one that is not counted yet.
    uncounted = 2 * largest
    assert sum(shard.raw_data.bytes for shard in read_index_of(packed).shards) > limit + uncounted
    assert len(sizes) == len(downloads) and limit - largest < max(sizes) <= limit + uncounted
    with pytest.raises(UserError, match=r"data\.cache_limit"):
        reader(open_data(config), cache_limit="4kb")


def bytes_below(directory):
    """Sum the sizes of all files; another thread may remove some of them meanwhile."""
    found = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.stat(os.path.join(parent, name)).st_size
    return found


def read_index_of(root):
    return read_index(root, "train", Manifest.read(root))


def test_damage_in_a_cache_is_mended(packed, plain, tmp_path, downloads):
    config = DataConfig(path=str(tmp_path / "cache"), remote=str(packed))
    expected = samples(open_data(config))
    first, second, third = (tmp_path / "cache/train" / name for name in shards(plain)[:3])
    downloads.clear()
    assert samples(open_data(DataConfig(path=str(tmp_path / "cache")))) == expected and not downloads
    os.truncate(first, 100)
    second.unlink()
    assert samples(open_data(DataConfig(path=str(tmp_path / "cache")))) == expected and len(downloads) == 2
    loader = reader(open_data(config))
    os.truncate(third, 100)
    assert torch.cat([batch["tokens"] for batch in loader]).tolist() == expected[1]
    content = bytearray(third.read_bytes())
    content[-1] ^= 1
    third.write_bytes(content)
    (problem,) = verify_dataset(tmp_path / "cache")
    assert str(third) in problem
    third.unlink()
    shutil.copy(packed / "train" / stored(packed)[2], third.parent)  # a cache that somebody has filled
    downloads.clear()
    assert samples(open_data(config)) == expected
    assert all("shard" not in name for name, _ in downloads)


def test_damage_of_decompressed_files_is_mended(data, plain, tmp_path):
    expected = samples(DataMixture.at(plain))
    samples(DataMixture.at(data))
    first, second, third = (data / "train" / name for name in shards(plain)[:3])
    victim = tmp_path / "victim"
    victim.write_bytes(first.read_bytes())
    first.unlink()
    first.symlink_to(victim)
    os.truncate(second, 2**20)
    (data / "train/.fetch.old").mkdir()
    os.utime(data / "train/.fetch.old", (1, 1))
    assert len(verify_dataset(data)) == 2
    loader = reader(DataMixture.at(data))
    os.truncate(third, 100)
    assert torch.cat([batch["tokens"] for batch in loader]).tolist() == expected[1]
    assert not first.is_symlink() and victim.is_file() and verify_dataset(data) == []
    assert not (data / "train/.fetch.old").exists()
    third.write_bytes(third.read_bytes()[:-1] + b"\xff")
    (problem,) = verify_dataset(data)
    assert str(third) in problem


def forge(root, content, **raw):
    """Replace the first compressed shard; index and manifest agree with it, except on what it decompresses to."""
    path, index_path = root / "train/shard.00000.mds.zstd", root / "train/index.json"
    path.write_bytes(content)
    index = json.loads(index_path.read_text())
    index["shards"][0]["zip_data"] |= {"bytes": len(content), "hashes": {"sha1": hashlib.sha1(content).hexdigest()}}
    index["shards"][0]["raw_data"] |= raw
    write_index(root, index)


def write_index(root, index):
    (root / "train/index.json").write_text(json.dumps(index))
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["fingerprint"]
    for file in manifest["splits"]["train"]["files"]:
        found = (root / file["file"]).read_bytes()
        file |= {"bytes": len(found), "sha256": hashlib.sha256(found).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(manifest))


def frame(content, **options):
    return zstandard.ZstdCompressor(**options).compress(content)


def header(size, window_log):
    """The header of a frame of `size` bytes."""
    return b"\x28\xb5\x2f\xfd\x80" + bytes([window_log - 10 << 3]) + size.to_bytes(4, "little")


def lying(size, blocks):
    """A frame whose header gives `size` bytes, before blocks of 128 KiB of zeros."""
    return header(size, 17) + ((1 << 1) | (2**17 << 3)).to_bytes(3, "little").join([b""] + [b"\0"] * blocks)


HOSTILE = {
    "truncated": lambda raw: frame(raw)[:-7],
    "empty": lambda raw: b"",
    "other bytes": lambda raw: frame(raw[:-1] + bytes([raw[-1] ^ 1])),
    "wrong magic": lambda raw: b"\x1f\x8b" + frame(raw)[2:],
    "another format": lambda raw: raw,
    "a bomb": lambda raw: frame(bytes(2**26)),
    "a bomb without a size": lambda raw: frame(bytes(2**26), write_content_size=False),
    "a bomb behind the size of the index": lambda raw: lying(len(raw), 2**12),
    "fewer": lambda raw: frame(raw[:-8]),
    "more": lambda raw: frame(raw + bytes(8)),
    "a second frame": lambda raw: frame(raw[:-8]) + frame(raw[-8:]),
    "a skippable frame": lambda raw: b"\x50\x2a\x4d\x18" + len(raw).to_bytes(4, "little") + raw,
    "a window of 2 GiB": lambda raw: header(len(raw), 31) + bytes(30),
    "noise": lambda raw: bytes(np.random.default_rng(0).integers(0, 256, 500, np.uint8)),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_one_line_in_bounded_memory(data, make, tmp_path, capsys):
    forge(data, make(zstandard.decompress((data / "train/shard.00000.mds.zstd").read_bytes())))
    config = DataConfig(path=str(tmp_path / "cache"), remote=str(data))
    shard, path = read_index_of(data).shards[0], data / "train/shard.00000.mds.zstd"
    tracemalloc.start()
    assert str(path) in refusal(lambda: [len(chunk) for chunk in decompressed(path, shard, str(path))])
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    for read in (
        lambda: read_split(data, "train", [0]),
        lambda: list(reader(DataMixture.at(data))),
        lambda: list(reader(open_data(config))),
    ):
        message = refusal(read)
        assert f"{data}/train/shard.00000.mds.zstd" in message and "NEWLINE" not in message
    # A thread that reads ahead may still be fetching into a directory of its own.
    assert not [root for root in (data, tmp_path / "cache") if (root / "train/shard.00000.mds").exists()]
    capsys.readouterr()
    assert main(["prepare", "--verify", str(data)]) == 1
    found = capsys.readouterr()
    assert "train/shard.00000.mds.zstd" in found.out and found.err.count("\n") == 1


@pytest.mark.parametrize("put", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["shard.00001.mds.zstd", "shard.00001.mds"])
def test_what_is_no_file(data, put, name):
    loader, path = reader(DataMixture.at(data)), data / "train" / name
    path.unlink(missing_ok=True)
    put(path)
    message = refusal(list, loader)
    if name.endswith(".zstd") or put is os.mkdir:
        assert "shard.00001.mds" in message and "NEWLINE" not in message
    else:
        assert message is None and path.is_file() and not path.is_symlink()


def edit(keys, value):
    def apply(index):
        place = index["shards"][0]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return apply


@pytest.mark.parametrize(
    "change",
    [
        edit(("compression",), None),
        edit(("compression",), "gz"),
        edit(("compression",), "zstd:"),
        edit(("zip_data",), None),
        edit(("raw_data", "basename"), "index.json"),
        edit(("raw_data", "basename"), "../manifest.json"),
        edit(("raw_data", "basename"), "shard.00001.mds"),
        edit(("raw_data", "bytes"), 2**31),
        edit(("raw_data", "bytes"), 10),
        edit(("raw_data", "hashes"), {}),
        edit(("zip_data", "hashes"), {"md5": "0"}),
        edit(("zip_data", "basename"), "shard.00000.mds"),
        edit(("zip_data", "bytes"), 1),
    ],
)
def test_impossible_entries_of_an_index(data, change):
    before = sorted(path.name for path in data.rglob("*"))
    index = json.loads((data / "train/index.json").read_text())
    change(index)
    write_index(data, index)
    for read in (lambda: reader(DataMixture.at(data)), lambda: read_split(data, "train")):
        message = refusal(read)
        assert "train/index.json" in message and "NEWLINE" not in message
    assert len(verify_dataset(data)) == 1
    assert sorted(path.name for path in data.rglob("*")) == before


def test_every_flip_of_a_compressed_shard_is_found(data, plain):
    path, good = data / "train/shard.00000.mds.zstd", read_split(plain, "train", range(8))
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 211):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert str(path) in refusal(read_split, data, "train", range(8))
        assert not shards(data)
    path.write_bytes(content)
    assert np.array_equal(read_split(data, "train", range(8)), good)


def test_a_disk_without_space_is_one_line(data):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes; SIGXFSZ is ignored by Python
    try:
        message = refusal(read_split, data, "train", [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(data / "train/shard.00000.mds") in message and "data.path" in message
    assert not shards(data) and not list((data / "train").glob(".*"))
    assert read_split(data, "train", [0]).shape[0] == 1


COUNTING = """
import os, sys
from pathlib import Path
from scmdm.data import shard_files
import torch.distributed as dist
decompress = shard_files.decompress_file
def counted(path, shard, to, name):
    with open(sys.argv[2], "a") as file:
        file.write(to.name + "\\n")
    decompress(path, shard, to, name)
shard_files.decompress_file = counted
from scmdm.data.loader import build_loader, read_split
from scmdm.data.mixture import DataMixture
dist.init_process_group("gloo")
root = Path(sys.argv[1])
loader = build_loader(DataMixture.at(root), "train", batch_size=8, shuffle=True, seed=0, drop_last=True)
assert sum(len(batch["index"]) for batch in loader) > 0
read_split(root, "validation")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_ranks_of_a_machine_decompress_each_shard_once(data, tmp_path):
    (tmp_path / "count.py").write_text(COUNTING)
    status, output = launch(2, data, tmp_path / "log", module=str(tmp_path / "count.py"))
    assert status == 0, output
    found = sorted((tmp_path / "log").read_text().split())
    assert found == sorted([*shards(data), *shards(data, "validation")])
    assert len(shards(data)) == len(stored(data)) and not shards(data, "test")
