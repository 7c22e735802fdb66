"""The streaming loader: every sample once an epoch, exact resume, two readers at a time, damaged shards."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scmdm.data.loader import build_loader, epochs, read_split, spread_rows
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture
from scmdm.data.preparation.shard_writer import Description, write_dataset
from scmdm.data.shard_index import COLUMN, read_index
from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.errors import UserError
from tests.data.sets import write_texts


def loader(root, split="train", **options):
    return build_loader(
        DataMixture.at(root), split, **{"batch_size": 32, "shuffle": True, "seed": 3, "drop_last": True, **options}
    )


def test_an_epoch_is_every_sample_once(molecules):
    whole = read_split(molecules, "train")
    seen = list(loader(molecules, drop_last=False))
    index = torch.cat([batch["index"] for batch in seen])
    assert sorted(index.tolist()) == list(range(len(whole)))
    assert index.tolist() != sorted(index.tolist())
    tokens = torch.cat([batch["tokens"] for batch in seen])
    assert tokens.dtype == torch.int64
    assert np.array_equal(tokens.numpy(), whole[index.numpy()])


def test_order_depends_on_seed_and_epoch_only(molecules):
    def order(reader):
        return [tuple(batch["index"].tolist()) for batch in reader]

    one, two = loader(molecules), loader(molecules)
    first, second = order(one), order(one)
    assert first != second
    assert [order(two), order(two)] == [first, second]
    assert order(loader(molecules, seed=4)) != first
    assert order(loader(molecules, num_workers=1)) == first


def test_two_splits_and_two_readers_at_a_time(molecules):
    train, validation, again = loader(molecules), loader(molecules, "validation", shuffle=False), loader(molecules)
    batches = list(zip(train, again, validation, strict=False))
    assert batches and all(torch.equal(a["tokens"], b["tokens"]) for a, b, _ in batches)


@pytest.mark.parametrize("stop", [1, 5, 22, 23, 24, 30])
def test_resume_in_mid_epoch_and_at_its_end(molecules, stop):
    """The training split has 23 batches; a resume goes on with the very next one."""

    def stream(reader):
        while True:
            for batch in reader:
                yield batch["index"], reader.state_dict()

    whole = stream(loader(molecules))
    reference = [next(whole) for _ in range(60)]
    resumed = loader(molecules)
    resumed.load_state_dict(reference[stop - 1][1])
    continued = stream(resumed)
    for expected, _ in reference[stop:]:
        assert torch.equal(next(continued)[0], expected)


def test_reading_a_damaged_split_names_it(molecules, tmp_path):
    shutil.copytree(molecules, tmp_path / "qm9")
    shard = next((tmp_path / "qm9" / "train").glob("*.mds"))
    assert np.array_equal(read_split(tmp_path / "qm9", "train", range(7)), read_split(molecules, "train")[:7])
    os.truncate(shard, 300)
    with pytest.raises(UserError, match=r"train/shard\.00000\.mds.*prepare --verify"):
        read_split(tmp_path / "qm9", "train")


def test_rows_of_a_split_over_several_shards(tmp_path):
    tokenizer = CharacterTokenizer("abcdefgh")
    texts = {name: [[4 + (i * k) % 8 for k in range(6)] for i in range(500)] for name in ("train", "validation")}
    write_dataset(tmp_path / "data", tokenizer, texts, Description("x", 8, "loss", "given", {}), shard_bytes=2000)
    whole = read_split(tmp_path / "data", "train")
    assert len(list((tmp_path / "data/train").glob("*.mds"))) > 2 and whole[:, :6].tolist() == texts["train"]
    rows = [0, 3, 250, 251, 499]
    assert np.array_equal(read_split(tmp_path / "data", "train", rows), whole[rows])


def test_whole_shards_are_read_as_their_samples_are(tmp_path):
    root = write_texts(tmp_path / "data", 480)
    whole = read_split(root, "train")
    rows = np.array([read_split(root, "train", [row])[0] for row in range(0, 480, 7)])
    assert whole.dtype == rows.dtype and np.array_equal(whole[::7], rows)
    twice = [0, *range(read_index(root, "train", Manifest.read(root)).shards[0].samples - 1)]
    assert np.array_equal(read_split(root, "train", twice), whole[twice])
    shard = root / "train/shard.00001.mds"
    content = bytearray(shard.read_bytes())
    content[4 * 7] ^= 1  # in the table of the samples' places
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard\.00001\.mds"):
        read_split(root, "train")


def test_spread_rows_cover_a_split_evenly():
    assert spread_rows(10, 20) == list(range(10))
    assert spread_rows(9, 3) == [0, 4, 8]
    assert spread_rows(1, 5) == [0]
    rows = spread_rows(6592, 1024)
    assert len(rows) == 1024 and max(b - a for a, b in itertools.pairwise(rows)) <= 7


def test_users_mistakes(molecules, tmp_path):
    with pytest.raises(UserError, match="no split 'nope'; it has train, validation, test"):
        loader(molecules, "nope")
    with pytest.raises(UserError, match="fewer than a batch of 5000"):
        loader(molecules, batch_size=5000)
    with pytest.raises(UserError, match="not a prepared data set"):
        loader(tmp_path)


def test_a_shard_that_disappears_does_not_end_the_epoch_in_silence(molecules, tmp_path):
    shutil.copytree(molecules, tmp_path / "qm9")
    reader = loader(tmp_path / "qm9")
    next((tmp_path / "qm9" / "train").glob("*.mds")).unlink()
    with pytest.raises(UserError, match=r"shard\.00000\.mds"):
        for _ in zip(epochs(reader, 32), range(100), strict=False):
            pass


@pytest.mark.parametrize("ask", ["thread", "reader"])
def test_a_missing_shard_is_never_marked_as_being_prepared(molecules, tmp_path, ask):
    """Whoever finds it missing says so at once; a mark would let the other one wait for ever."""
    shutil.copytree(molecules, tmp_path / "qm9")
    dataset = loader(tmp_path / "qm9").dataset
    next((tmp_path / "qm9" / "train").glob("*.mds")).unlink()
    before = int(dataset._shard_states[0])
    with pytest.raises(UserError, match=r"shard\.00000\.mds is missing"):
        dataset.prepare_shard(0, blocking=ask == "reader")
    assert int(dataset._shard_states[0]) == before
    with pytest.raises(UserError, match=r"shard\.00000\.mds"):
        dataset[0]


def test_epochs_go_on_and_on(molecules):
    reader = loader(molecules)
    seen = [batch["index"] for batch, _ in zip(epochs(reader, 32), range(60), strict=False)]
    assert len(seen) == 60


@pytest.mark.slow
def test_runs_that_start_together(molecules):
    code = "import sys; from pathlib import Path; from scmdm.data.loader import build_loader\n"
    code += "from scmdm.data.mixture import DataMixture\n"
    code += "args = dict(batch_size=32, shuffle=True, seed=0, drop_last=True)\n"
    code += "for _ in range(8): print(sum(1 for _ in build_loader(DataMixture.at(Path(sys.argv[1])), 'train', **args)))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(molecules)]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors


def test_a_shard_that_goes_bad_while_reading_is_named(molecules, tmp_path):
    shutil.copytree(molecules, tmp_path / "qm9")
    reader = loader(tmp_path / "qm9")
    shard = next((tmp_path / "qm9" / "train").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot read sample \d+ from .*shard\.00000\.mds"):
        list(reader)


def test_names_of_other_runs_are_not_taken(molecules):
    """Two numbers are partly in use. Streaming's own search takes the second, whose name `locals` is in use."""
    free = next(n for n in itertools.count() if not list(Path("/dev/shm").glob(f"{n:06}_*")))
    remains = [Path(f"/dev/shm/{free:06}_barrier"), Path(f"/dev/shm/{free + 1:06}_locals")]
    try:
        for piece in remains:
            piece.write_bytes(b"\0" * 12)
        assert len(next(iter(loader(molecules)))[COLUMN]) == 32
        assert all(piece.read_bytes() == b"\0" * 12 for piece in remains)
    finally:
        for piece in remains:
            piece.unlink()


@pytest.mark.slow
def test_readers_that_are_not_used_are_not_imported_but_can_be():
    """They cost seconds at every start."""
    code = (
        "import sys, scmdm.training.trainer\n"
        "print([name for name in ('torchvision', 'sklearn', 'transformers') if name in sys.modules])\n"
        "import streaming.text, streaming.vision, transformers.tokenization_utils_base\n"
        "assert transformers.BatchEncoding.__module__ == 'transformers.tokenization_utils_base'\n"
        "print(streaming.text.StreamingC4.__name__, streaming.vision.StreamingCIFAR10.__name__)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split("\n")[:2] == ["[]", "StreamingC4 StreamingCIFAR10"]
