"""Shards that machines download, and one order of the samples for any number of machines."""

from itertools import chain, islice
from pathlib import Path

import pytest
import torch.distributed as dist

from scmdm.config.data import DataConfig
from scmdm.config.run import RunConfig
from scmdm.data.loader import build_loader, canonical_nodes, epochs
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture, open_data
from scmdm.errors import UserError
from scmdm.training.setup import resolve_sample_order
from tests.data.sets import write_texts

BATCH = 32
SHARDS = 128


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A data set of many shards in a mounted directory."""
    root = write_texts(tmp_path_factory.mktemp("sets") / "texts", 1280, shard_bytes=400)
    assert len(shards(root)) >= SHARDS
    return root


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The same samples in the same shards, compressed."""
    return write_texts(tmp_path_factory.mktemp("compressed") / "texts", 1280, shard_bytes=400, compression="zstd")


@pytest.fixture(autouse=True)
def group():
    """A process group of this process: streaming would otherwise wait for the other machines."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shards(root):
    return {path.name for path in (root / "train").glob("*.mds")}


def machine(monkeypatch, rank, machines):
    """Make this process the only one of a machine."""
    values = {"RANK": rank, "WORLD_SIZE": machines, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def run_epoch(monkeypatch, remote, place, machines, nodes, state=None, steps=None):
    """Read an epoch on every machine in turn, each with a cache of its own; returns ids by step, and caches."""
    steps_of_all, caches = [], []
    for rank in range(machines):
        machine(monkeypatch, rank, machines)
        cache = Path(place / f"cache_{machines}_{nodes}_{rank}")
        data = open_data(DataConfig(path=str(cache), remote=str(remote)))
        loader = build_loader(
            data, "train", batch_size=BATCH // machines, shuffle=True, seed=0, drop_last=True,
            num_canonical_nodes=nodes, shuffle_block=max(1, 256 // nodes),
        )  # fmt: skip
        count = loader.dataset.epoch_size // BATCH if steps is None else steps
        batches = [batch["index"].tolist() for batch in islice(epochs(loader, BATCH, state), count)]
        steps_of_all.append((batches, loader.state_dict()))
        caches.append(shards(cache))
    ids = [sorted(chain.from_iterable(parts)) for parts in zip(*(batches for batches, _ in steps_of_all), strict=True)]
    return ids, caches, steps_of_all[0][1]


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_compression_changes_the_bytes_of_each_machine_alone(
    monkeypatch, remote, compressed, tmp_path, machines, downloads
):
    machine(monkeypatch, 0, machines)
    nodes = canonical_nodes(open_data(DataConfig(path=str(tmp_path / "cache"), remote=str(remote))), "train", machines)
    found = []
    for root in (remote, compressed):
        downloads.clear()
        ids, caches, _ = run_epoch(monkeypatch, root, tmp_path / root.parent.name, machines, nodes)
        sizes = {file.file: file.bytes for file in Manifest.read(root).splits["train"].files}
        fetched = [(name, size) for name, size in downloads if name.startswith("train/shard")]
        assert all(sizes[name] == size for name, size in fetched)
        assert len(fetched) == sum(map(len, caches))
        found.append((ids, caches, sum(size for _, size in fetched)))
    (ids, caches, size), (packed_ids, packed_caches, packed_size) = found
    assert (ids, caches) == (packed_ids, packed_caches)
    assert packed_size < size


def excess(caches, root):
    """Shards downloaded beyond one copy of the data set."""
    return sum(map(len, caches)) - len(shards(root))


@pytest.mark.parametrize("machines", [2, 4])
def test_machines_download_different_shards(monkeypatch, remote, tmp_path, machines):
    machine(monkeypatch, 0, machines)
    data = open_data(DataConfig(path=str(tmp_path / "cache"), remote=str(remote)))
    nodes = canonical_nodes(data, "train", machines)
    assert nodes % machines == 0
    assert machines <= nodes <= 64
    _, one, _ = run_epoch(monkeypatch, remote, tmp_path, machines, 1)
    _, own, _ = run_epoch(monkeypatch, remote, tmp_path, machines, nodes)
    assert excess(own, remote) <= nodes - 1
    assert all(len(cache) <= len(shards(remote)) / machines + nodes for cache in own)
    assert excess(one, remote) > (machines - 1) * len(shards(remote)) // 2, "the reason for more canonical nodes"


def test_the_order_is_that_of_any_number_of_machines(monkeypatch, remote, tmp_path):
    expected, _, state = run_epoch(monkeypatch, remote, tmp_path, 4, 8)
    for machines in (1, 2, 8):
        found, _, _ = run_epoch(monkeypatch, remote, tmp_path, machines, 8)
        assert found == expected
    first, _, state = run_epoch(monkeypatch, remote, tmp_path / "a", 4, 8, steps=7)
    rest, _, _ = run_epoch(monkeypatch, remote, tmp_path / "b", 2, 8, state=state, steps=9)
    assert first + rest == expected[:16]


def test_local_data_and_one_machine_have_one(remote, tmp_path):
    assert canonical_nodes(DataMixture.at(remote), "train", 4) == 1
    cached = open_data(DataConfig(path=str(tmp_path / "cache"), remote=str(remote)))
    assert canonical_nodes(cached, "train", 1) == 1


def test_a_number_of_machines_that_does_not_divide_is_refused(monkeypatch, remote):
    machine(monkeypatch, 0, 3)
    with pytest.raises(UserError, match=r"data\.num_canonical_nodes=4 .*3 machines"):
        build_loader(
            DataMixture.at(remote), "train", batch_size=4, shuffle=True, seed=0, drop_last=True, num_canonical_nodes=4
        )


@pytest.mark.parametrize(
    ("stored", "nodes", "block"), [("{}", None, None), ("{num_canonical_nodes: 1}", 1, None),
    ("{num_canonical_nodes: 8, shuffle_block: 9}", 8, 9)],
)  # fmt: skip
def test_a_run_keeps_the_order_of_its_first_start(monkeypatch, remote, tmp_path, stored, nodes, block):
    machine(monkeypatch, 0, 4)
    config = RunConfig(data=DataConfig(path=str(tmp_path / "cache"), remote=str(remote)))
    data = open_data(config.data)
    chosen = resolve_sample_order(config, data, None).data
    assert chosen.num_canonical_nodes == canonical_nodes(data, "train", 4) > 1
    assert chosen.shuffle_block == (1 << 18) // chosen.num_canonical_nodes
    (tmp_path / "config.yaml").write_text(f"data: {stored}\n")
    resumed = resolve_sample_order(config, data, tmp_path).data
    assert (resumed.num_canonical_nodes, resumed.shuffle_block) == (nodes, block)
    assert Manifest.read(remote).fingerprint() == data.manifest.fingerprint()
