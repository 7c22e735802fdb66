"""Data sets in an object store (a real S3 API on the loopback interface): caches, damage, limits, mistakes."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.config.data import DataConfig, StreamConfig
from scmdm.data import shard_files
from scmdm.data.loader import build_loader, epochs, read_split
from scmdm.data.manifest import Manifest, remote_of
from scmdm.data.mixture import open_data
from scmdm.data.mosaic_streaming import ShardState
from scmdm.data.remote import upload_dataset
from scmdm.data.verification import verify_dataset
from scmdm.errors import UserError
from tests.conftest import TINY
from tests.data.sets import write_texts
from tests.distributed.launching import launch

URL = "s3://bucket/texts"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """480 training samples in six shards."""
    return write_texts(tmp_path_factory.mktemp("sets") / "texts", 480)


@pytest.fixture(scope="module")
def remote(s3, local):
    upload_dataset(local, URL)
    return URL


def shards(root, split="train"):
    return sorted(path.name for path in (root / split).glob("*.mds"))


def spoil(s3, key):
    """Change one byte of an object; returns the way back."""
    good = s3.get_object(Bucket="bucket", Key=key)["Body"].read()
    s3.put_object(Bucket="bucket", Key=key, Body=good[:-1] + bytes([good[-1] ^ 1]))
    return lambda: s3.put_object(Bucket="bucket", Key=key, Body=good)


def cached(tmp_path, remote, **keys):
    return DataConfig(path=str(tmp_path / "cache"), remote=remote, **keys)


def reader(config, **options):
    keys = {"batch_size": 32, "shuffle": True, "seed": 0, "drop_last": False, "shuffle_block": 100}
    return build_loader(open_data(config), "train", **{**keys, **options})


def order(loader):
    return torch.cat([batch["index"] for batch in loader]).tolist()


def train(run, config, *overrides):
    fixed = [*TINY, "precision=float32", "train.validate_every=5", "data.shuffle_block=100"]
    return ["train", str(config), f"run_dir={run}", "train.steps=12", *fixed, *overrides]


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("nelbo_null")) for row in rows]


def test_training_from_a_small_cache_is_training_from_the_directory(local, remote, tmp_path, empty_yaml, monkeypatch):
    steps = "train.steps=36"  # three epochs: each needs every shard again
    assert main(train(tmp_path / "local", empty_yaml, f"data.path={local}", steps)) == 0
    fetched = []
    fetch = shard_files.fetch

    def counted(root, origin, file):
        size = fetch(root, origin, file)
        fetched.extend([file.file] if size and file.file.startswith("train/") else [])
        return size

    monkeypatch.setattr(shard_files, "fetch", counted)
    largest = max(path.stat().st_size for path in (local / "train").glob("*.mds"))
    limit = (local / "train/index.json").stat().st_size + 7 * largest // 2  # of six shards, three or four
    keys = [f"data.path={tmp_path / 'cache'}", f"data.remote={remote}", f"data.cache_limit={limit}b", steps]
    assert main(train(tmp_path / "remote", empty_yaml, *keys)) == 0
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "remote")) == 36 + 8
    assert set(fetched) == {f"train/{name}" for name in shards(local)}
    assert len(fetched) > len(set(fetched)), "nothing was removed from the cache and fetched again"
    # How many there are at the end is the reading thread's affair: it goes on for a while behind the run.
    assert shards(tmp_path / "cache", "validation") == shards(local, "validation")
    assert shards(tmp_path / "cache", "test") == []


class Epoch:
    """What the threads of an epoch share: a single sample."""

    total = 1

    def __init__(self, sample):
        self.sample_ids, self.ready_index, self.yield_index = [sample], 0, 0
        self.looked, self.ended = threading.Event(), threading.Event()

    def should_exit(self):
        self.looked.set()
        return False

    def on_exit(self):
        self.ended.set()


def test_a_shard_that_is_evicted_while_the_reader_waits_for_it_is_fetched_again(local, remote, tmp_path):
    """As in a small cache: fetched by one thread, and evicted for another shard before the second one looks."""
    dataset = reader(cached(tmp_path, remote, cache_limit="1mb")).dataset
    dataset._event = threading.Event()
    states, epoch = dataset._shard_states, Epoch(0)
    states[0] = ShardState.PREPARING
    thread = threading.Thread(target=dataset._ready_thread, args=(epoch,), daemon=True)
    thread.start()
    assert epoch.looked.wait(60)
    time.sleep(0.1)  # it waits for the thread that fetches
    states[0] = ShardState.REMOTE
    assert epoch.ended.wait(60) and epoch.ready_index == 1 and states[0] == ShardState.LOCAL
    assert shards(tmp_path / "cache") == shards(local)[:1]


def test_the_cache_is_enough_once_it_is_full(local, remote, tmp_path, monkeypatch):
    config = cached(tmp_path, remote)
    expected = order(reader(DataConfig(path=str(local))))
    assert order(reader(config)) == expected
    assert shards(tmp_path / "cache") == shards(local)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    assert order(reader(DataConfig(path=str(tmp_path / "cache")))) == expected


def test_a_split_of_a_cache_is_fetched_when_it_is_read(local, remote, tmp_path):
    open_data(cached(tmp_path, remote))
    cache = tmp_path / "cache"
    assert not list(cache.rglob("*.mds")) and verify_dataset(cache) == []
    assert np.array_equal(read_split(cache, "test", [0, 5]), read_split(local, "test", [0, 5]))
    assert shards(cache, "test") == shards(local, "test")[:1], "only that of the rows"
    assert np.array_equal(read_split(cache, "test"), read_split(local, "test"))
    assert shards(cache, "test") == shards(local, "test") and shards(cache) == []


def test_damaged_and_lost_files_of_a_cache_are_fetched_again(local, remote, tmp_path):
    config, cache = cached(tmp_path, remote), tmp_path / "cache"
    expected = order(reader(config))
    first, second, third = (cache / "train" / name for name in shards(local)[:3])
    os.truncate(first, 100)
    second.unlink()
    (cache / "train/index.json").write_text("{")
    assert order(reader(config)) == expected
    loader = reader(config)  # sizes have been checked
    os.truncate(third, 200)
    second.unlink()
    assert order(loader) == expected
    assert all((cache / "train" / name).read_bytes() == (local / "train" / name).read_bytes() for name in shards(local))


def test_a_flipped_bit_in_a_cache_is_found_by_verify(remote, tmp_path, capsys):
    order(reader(cached(tmp_path, remote)))
    shard = next((tmp_path / "cache/train").glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["prepare", "--verify", str(tmp_path / "cache")]) == 1
    found = capsys.readouterr()
    assert f"{shard} does not match its SHA-256" in found.out and f"to download them from {remote} again" in found.err
    shard.unlink()
    assert main(["prepare", "--verify", str(tmp_path / "cache")]) == 0
    assert remote in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_object_is_named_and_never_kept(s3, local, tmp_path, empty_yaml, capsys, workers):
    url = f"s3://bucket/damaged{workers}"
    upload_dataset(local, url)
    name = shards(local)[3]
    mend = spoil(s3, f"damaged{workers}/train/{name}")
    keys = [f"data.path={tmp_path / 'cache'}", f"data.remote={url}", f"data.num_workers={workers}"]
    assert main(train(tmp_path / "run", empty_yaml, *keys)) == 1
    error = capsys.readouterr().err
    assert f"{url}/train/{name} is damaged" in error and error.count("\n") == 1
    assert not (tmp_path / "cache/train" / name).exists()
    mend()
    assert main(train(tmp_path / "run", empty_yaml, *keys)) == 0


def test_a_damaged_index_or_tokenizer_is_named(s3, local, tmp_path):
    upload_dataset(local, "s3://bucket/broken")
    for name in ("tokenizer.json", "train/index.json"):
        mend = spoil(s3, f"broken/{name}")
        with pytest.raises(UserError, match=f"s3://bucket/broken/{name} is damaged"):
            open_data(cached(tmp_path, "s3://bucket/broken"))
        mend()
    assert not (tmp_path / "cache/manifest.json").exists()
    open_data(cached(tmp_path, "s3://bucket/broken"))


@pytest.mark.parametrize(
    ("url", "endpoint", "reason"),
    [
        ("s3://no-such-bucket/x", None, "not found"),
        ("s3://bucket/no-such-prefix", None, "not found"),
        ("s3://bucket/texts", "http://127.0.0.1:9", "Could not connect"),
        ("ftp://host/x", None, "Unsupported remote path"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(s3, url, endpoint, reason, tmp_path, empty_yaml, capsys, monkeypatch):
    if endpoint is not None:
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    keys = [f"data.path={tmp_path / 'cache'}", f"data.remote={url}"]
    assert main(train(tmp_path / "run", empty_yaml, *keys)) == 1
    error = capsys.readouterr().err
    assert f"cannot fetch {url}/manifest.json" in error and reason in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_data_set_is_refused(s3, local, remote, tmp_path):
    open_data(cached(tmp_path, remote))
    other = write_texts(tmp_path / "other", 40, seed=5)
    upload_dataset(other, "s3://bucket/other")
    with pytest.raises(UserError, match=r"cache holds a different data set from s3://bucket/other"):
        open_data(cached(tmp_path, "s3://bucket/other"))
    upload_dataset(local, "s3://bucket/moved")
    open_data(cached(tmp_path, "s3://bucket/moved/"))
    assert remote_of(tmp_path / "cache") == "s3://bucket/moved"


def test_a_data_set_is_not_made_a_cache(local, remote, tmp_path, empty_yaml, capsys):
    own = shutil.copytree(local, tmp_path / "cache")
    before = sorted(own.rglob("*"))
    assert main(train(tmp_path / "run", empty_yaml, f"data.path={own}", f"data.remote={remote}")) == 1
    error = capsys.readouterr().err
    assert f"data.path={own}" in error and "data.remote" in error and error.count("\n") == 1
    assert sorted(own.rglob("*")) == before and remote_of(own) is None


def test_a_damaged_manifest_of_a_cache_is_fetched_again_after_its_removal(local, remote, tmp_path):
    config, cache = cached(tmp_path, remote), tmp_path / "cache"
    expected = order(reader(config))
    (cache / "manifest.json").write_text("{")
    for broken in (config, DataConfig(path=str(cache))):
        with pytest.raises(UserError, match=r"cache/manifest\.json.*remove.*data\.remote") as refused:
            open_data(broken)
        assert "overwrite" not in str(refused.value)
    (cache / "manifest.json").unlink()
    assert order(reader(config)) == expected
    (cache / "remote.json").write_text("{")
    with pytest.raises(UserError, match=r"cache/remote\.json.*remove.*manifest\.json.*data\.remote"):
        open_data(DataConfig(path=str(cache)))
    for name in ("remote.json", "manifest.json"):
        (cache / name).unlink()
    assert order(reader(config)) == expected


def test_a_damaged_file_may_go_while_it_is_checked(remote, tmp_path, monkeypatch):
    """Another rank removes it first."""
    config, cache = cached(tmp_path, remote), tmp_path / "cache"
    expected = order(reader(config))
    first = cache / "train" / shards(cache)[0]
    os.truncate(first, 100)
    is_file = Path.is_file

    def then_gone(path):
        found = is_file(path)
        if path == first:
            path.unlink(missing_ok=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", then_gone)
        open_data(DataConfig(path=str(cache)))
    assert order(reader(config)) == expected


def test_limits_of_caches(local, remote, tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_limit=1gb .*data\.path="):
        open_data(DataConfig(path=str(local), cache_limit="1gb"))
    config = cached(tmp_path, remote)
    with pytest.raises(UserError, match=r"data\.cache_limit=5kb is not possible: .*four times the largest shard"):
        reader(config, cache_limit="5kb")
    first = reader(config, cache_limit="1mb")
    with pytest.raises(UserError, match="is the limited cache of another run"):
        reader(config, cache_limit="1mb")
    del first
    reader(config, cache_limit="1mb")


def test_two_readers_share_a_cache_without_a_limit(remote, tmp_path):
    config = cached(tmp_path, remote)
    one, two = reader(config), reader(config, seed=1)
    batches = list(zip(one, two, strict=True))
    assert batches and all(len(a["index"]) == len(b["index"]) for a, b in batches)


def test_streams_may_be_local_and_remote(local, remote, tmp_path):
    extra = write_texts(tmp_path / "extra", 100, seed=4)

    def config(path, url):
        return DataConfig(
            streams={"extra": StreamConfig(str(extra), 1), "texts": StreamConfig(str(path), 3, remote=url)}
        )

    def first(setting):
        return [batch["index"].tolist() for batch, _ in zip(epochs(reader(setting), 32), range(30), strict=False)]

    assert first(config(tmp_path / "cache", remote)) == first(config(local, None))
    assert open_data(config(tmp_path / "cache", remote)).manifest == open_data(config(local, None)).manifest


def test_prepare_uploads(s3, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for number in range(60):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"text number {number} of many\n")
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"source: {{name: text, path: {tmp_path / 'corpus'}}}\nout: {tmp_path / 'data'}\n"
        "tokenizer: {name: characters}\nlength: 32\n"
        "validation_fraction: 0.2\ntest_fraction: 0.2\n"
    )
    assert main(["prepare", str(config), "upload=s3://no-such-bucket/x"]) == 1
    error = capsys.readouterr().err
    assert "upload=s3://no-such-bucket/x" in error and error.count("\n") == 1
    assert main(["prepare", str(config), "upload=s3://bucket/prepared"]) == 0
    assert "uploaded to s3://bucket/prepared" in capsys.readouterr().out
    open_data(cached(tmp_path, "s3://bucket/prepared"))
    for split in ("train", "validation", "test"):
        assert np.array_equal(read_split(tmp_path / "cache", split), read_split(tmp_path / "data", split))
    assert main(["prepare", str(config)]) == 0  # the upload is no part of what the data set is
    assert "is up to date" in capsys.readouterr().out


OPENING = """
import sys
import torch
from scmdm.config.data import DataConfig
from scmdm.data import remote
from scmdm.system.process_group import current_world, process_group
from scmdm.training.trainer import open_data_together
download = remote.download
def counted(*given):
    with open(sys.argv[3], "a") as file:
        file.write(f"{given[1]}\\n")
    download(*given)
remote.download = counted
world = current_world()
with process_group(world, torch.device("cpu"), needed=True):
    try:
        found = open_data_together(DataConfig(path=sys.argv[1], remote=sys.argv[2]), world).manifest.fingerprint()
    except Exception as error:
        found = str(error)
    with open(sys.argv[4], "a") as file:
        file.write(f"{found}\\n")
"""


@pytest.mark.slow
def test_one_rank_of_a_machine_opens_the_data(local, remote, tmp_path):
    (tmp_path / "open.py").write_text(OPENING)

    def opened(url, name):
        files = [tmp_path / f"{name}.{kind}" for kind in ("downloads", "found")]
        status, output = launch(2, tmp_path / name, url, *files, module=str(tmp_path / "open.py"))
        assert status == 0, output
        return [path.read_text().splitlines() for path in files]

    downloads, found = opened(remote, "cache")
    assert found == [Manifest.read(local).fingerprint()] * 2
    assert downloads == [
        "manifest.json",
        "tokenizer.json",
        *(f"{s}/index.json" for s in ("train", "validation", "test")),
    ]
    downloads, found = opened("s3://no-such-bucket/x", "none")
    assert len(downloads) == 1 and len(found) == 2 and all("no-such-bucket" in text for text in found)


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_fill_one_cache_and_take_the_same_steps(local, remote, tmp_path, empty_yaml):
    keys = ["train.micro_batch_size=32", "threads=1"]
    assert main(train(tmp_path / "local", empty_yaml, f"data.path={local}", *keys)) == 0
    cache = [f"data.path={tmp_path / 'cache'}", f"data.remote={remote}", "data.cache_limit=1mb"]
    status, output = launch(2, *train(tmp_path / "ranks", empty_yaml, *cache, *keys))
    assert status == 0, output
    expected, found = losses(tmp_path / "local"), losses(tmp_path / "ranks")
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    for ours, theirs in zip(found, expected, strict=True):
        # A row has a training loss or a validation NELBO, never both.
        assert [v is None for v in ours] == [v is None for v in theirs]
        assert [v for v in ours if v is not None] == pytest.approx([v for v in theirs if v is not None], rel=1e-5)
    assert shards(tmp_path / "cache") == shards(local)
