"""Several streams: proportions, ids, order, resume, epoch boundaries, and what cannot be mixed."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.config.data import DataConfig, StreamConfig
from scmdm.data.dataset import repetitions
from scmdm.data.loader import build_loader, epochs, read_split
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import open_data
from scmdm.errors import UserError
from scmdm.training.validation import ValidationSet
from tests.conftest import TINY
from tests.data.sets import write_texts
from tests.distributed.launching import launch

BATCH = 32


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The large one is thinned out, the small one repeated: 500 samples of an epoch are 250 of each."""
    root = tmp_path_factory.mktemp("sets")
    return {
        "large": write_texts(root / "large", 400, seed=1),
        "small": write_texts(root / "small", 100, seed=2),
    }


def streams(sets, **proportions):
    return DataConfig(streams={name: StreamConfig(str(sets[name]), p) for name, p in proportions.items()})


def mixed(sets):
    return open_data(streams(sets, small=0.5, large=0.5))


def reader(data, **options):
    return build_loader(
        data, "train", **{"batch_size": BATCH, "shuffle": True, "seed": 3, "drop_last": True, **options}
    )


def batches(data, count, state=None, **options):
    """`count` batches as (ids, tokens, state behind it)."""
    loader = reader(data, **options)
    return [(b["index"], b["tokens"], loader.state_dict()) for b in islice(epochs(loader, BATCH, state), count)]


def test_an_epoch_has_the_proportions_and_an_id_for_every_repetition(sets):
    seen = list(reader(mixed(sets), drop_last=False))
    ids, tokens = torch.cat([batch["index"] for batch in seen]), torch.cat([batch["tokens"] for batch in seen])
    assert len(ids) == 500 == len(set(ids.tolist()))
    assert Counter((ids % 500 < 400).tolist()) == {True: 250, False: 250}
    # Every sample of the small stream two or three times; those of the large one at most once.
    repeats = Counter((ids % 500).tolist())
    assert all(repeats[i] <= 1 for i in range(400)) and all(repeats[i] in (2, 3) for i in range(400, 500))
    assert set((ids // 500).tolist()) == {0, 1, 2}
    whole = np.concatenate([read_split(sets[name], "train") for name in ("large", "small")])
    assert np.array_equal(tokens.numpy(), whole[ids.numpy() % 500])


def test_the_large_stream_is_thinned_out_anew_every_epoch(sets):
    loader = reader(mixed(sets), drop_last=False)
    first, second = ({i for batch in loader for i in batch["index"].tolist() if i < 400} for _ in range(2))
    assert len(first) == len(second) == 250 and first != second


def test_proportions_are_relative_and_the_order_of_the_keys_means_nothing(sets):
    one, two = open_data(streams(sets, small=0.5, large=0.5)), open_data(streams(sets, large=3, small=3))
    assert one.manifest.fingerprint() == two.manifest.fingerprint()
    assert all(torch.equal(a, b) for (a, *_), (b, *_) in zip(batches(one, 20), batches(two, 20), strict=True))
    other = open_data(streams(sets, large=0.7, small=0.3))
    assert other.manifest.fingerprint() != one.manifest.fingerprint()
    ids = torch.cat([batch["index"] for batch in reader(other, drop_last=False)])
    assert int((ids % 500 < 400).sum()) == 350


@pytest.mark.parametrize("stop", [1, 14, 15, 16, 29, 31])
def test_resume_is_exact_with_streams(sets, stop):
    """500 samples are 15 batches; 20 samples are left of every epoch."""
    reference = batches(mixed(sets), 40)
    continued = batches(mixed(sets), 40 - stop, reference[stop - 1][2])
    assert all(torch.equal(a, b) for (a, *_), (b, *_) in zip(reference[stop:], continued, strict=True))


def test_loader_processes_change_nothing(sets):
    expected = batches(mixed(sets), 34)
    found = batches(mixed(sets), 34, num_workers=2)
    assert all(torch.equal(a, b) for (a, *_), (b, *_) in zip(expected, found, strict=True))
    resumed = batches(mixed(sets), 14, expected[19][2], num_workers=1)
    assert all(torch.equal(a, b) for (a, *_), (b, *_) in zip(expected[20:], resumed, strict=True))


def test_repetitions():
    assert repetitions(np.array([5, 3, 5, 5, 3, 0])).tolist() == [0, 0, 1, 2, 1, 0]
    assert repetitions(np.array([], np.int64)).tolist() == []


def test_what_is_mixed_is_in_the_manifest(sets):
    manifest = mixed(sets).manifest
    assert manifest.name == "large+small" and manifest.splits["train"].samples == 500
    assert manifest.source["streams"]["small"] == {
        "name": "small",
        "fingerprint": Manifest.read(sets["small"]).fingerprint(),
        "proportion": 0.5,
    }


def test_validation_takes_all_streams_in_their_proportions_or_one(sets):
    def found(samples, **keys):
        config = streams(sets, large=0.75, small=0.25)
        for key, value in keys.items():
            setattr(config, key, value)
        drawn = ValidationSet.of(open_data(config), "validation", samples).batches(torch.device("cpu"), size=16)
        return torch.cat([batch.ids for batch in drawn])

    ids = found(40)
    assert int((ids < 80).sum()) == 30 and len(ids) == 40 == len(set(ids.tolist()))
    assert len(found(10_000)) == 80 + 20
    assert found(10_000, validation_stream="small").tolist() == list(range(20))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"symbols": "abcdefgx"}, "have different tokenizers"),
        ({"length": 12}, r"data\.streams\.a has length=8, data\.streams\.b has 12; prepare one of them again"),
        ({"pad_policy": "ignore"}, r"pad_policy='loss', data\.streams\.b has 'ignore'"),
        ({"bos_policy": "loss"}, r"bos_policy='given', data\.streams\.b has 'loss'"),
    ],
)
def test_what_cannot_be_mixed_is_named(tmp_path, other, message):
    sets = {"a": write_texts(tmp_path / "a", 20), "b": write_texts(tmp_path / "b", 20, **other)}
    with pytest.raises(UserError, match=message):
        open_data(streams(sets, a=1, b=1))


def test_the_same_directory_twice_is_refused(sets):
    with pytest.raises(UserError, match=r"data\.streams\.x and data\.streams\.y are the same directory"):
        open_data(streams({"x": sets["small"], "y": sets["small"]}, x=1, y=1))


def test_a_batch_that_all_ranks_together_cannot_fill_is_refused(sets, monkeypatch):
    data = open_data(DataConfig(path=str(sets["small"])))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="has 100 samples, fewer than a batch of 128"):
        reader(data, batch_size=64)


def train(run, sets, *overrides):
    keys = [f"data.streams.{name}.path={root}" for name, root in sets.items()]
    proportions = ["data.streams.large.proportion=0.5", "data.streams.small.proportion=0.5"]
    config = run.parent / "empty.yaml"
    config.write_text("{}\n")
    fixed = [*TINY, "train.micro_batch_size=16", "precision=float32", "train.validate_every=6"]
    return ["train", str(config), f"run_dir={run}", *keys, *proportions, *fixed, *overrides]


def rows(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("nelbo_null")) for r in found]


def test_training_on_streams_resumes_and_refuses_another_mixture(sets, tmp_path, capsys):
    """An epoch is 7 steps of 64."""
    assert main(train(tmp_path / "whole", sets, "train.steps=12")) == 0
    assert main(train(tmp_path / "parts", sets, "train.steps=4")) == 0
    assert main(train(tmp_path / "parts", sets, "train.steps=12")) == 0
    assert [r for r in rows(tmp_path / "parts") if r[1] is not None] == [
        r for r in rows(tmp_path / "whole") if r[1] is not None
    ]
    capsys.readouterr()
    assert main(train(tmp_path / "whole", sets, "train.steps=14", "data.streams.small.proportion=0.4")) == 1
    assert "data.streams.small.proportion=0.4, but run_dir=" in capsys.readouterr().err
    other = {**sets, "small": write_texts(tmp_path / "small", 100, seed=9)}
    assert main(train(tmp_path / "whole", other, "train.steps=14")) == 1
    assert "data.streams=large,small is not the data that" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "whole"), "num=0"]) == 1
    assert "was trained on several data sets; give data=DIRECTORY" in capsys.readouterr().err


PRINT_IDS = """
import json, os, sys
from itertools import islice
from pathlib import Path
import torch.distributed as dist
from scmdm.config.data import DataConfig, StreamConfig
from scmdm.data.loader import build_loader, epochs
from scmdm.data.mixture import open_data
large, small, count, state = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
dist.init_process_group("gloo")
config = DataConfig(streams={"large": StreamConfig(large, 0.5), "small": StreamConfig(small, 0.5)})
ranks = dist.get_world_size()
options = dict(shuffle=True, seed=3, drop_last=True, num_canonical_nodes=1)
loader = build_loader(open_data(config), "train", batch_size=72 // ranks, **options)
for batch in islice(epochs(loader, 72, state), count):
    ids = [None] * ranks
    dist.all_gather_object(ids, batch["index"].tolist())
    if dist.get_rank() == 0:
        print(json.dumps([sorted(sum(ids, [])), loader.state_dict()]), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def ids_of_ranks(processes, sets, count, state=None):
    script = sets["large"].parent / "print_ids.py"
    script.write_text(PRINT_IDS)
    arguments = [sets["large"], sets["small"], count, json.dumps(state)]
    status, output = launch(processes, *arguments, module=str(script))
    assert status == 0, output
    return [json.loads(line) for line in output.splitlines() if line.startswith("[[")]


@pytest.mark.long
@pytest.mark.slow
def test_global_batches_do_not_depend_on_the_ranks_also_at_the_end_of_an_epoch(tmp_path):
    """143 samples are one batch of 72; 2 ranks could make a second one of 71 samples and a repeated one, 3 as well."""
    sets = {"large": write_texts(tmp_path / "large", 103, seed=1), "small": write_texts(tmp_path / "small", 40, seed=2)}
    one = ids_of_ranks(1, sets, 5)
    assert len(one) == 5 and all(len(set(ids)) == 72 for ids, _ in one)
    assert [state["epoch"] for _, state in one] == [0, 1, 2, 3, 4]
    assert ids_of_ranks(2, sets, 5) == one
    assert ids_of_ranks(2, sets, 3, one[1][1]) == one[2:]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_on_streams_goes_on_with_another_number_of_ranks(sets, tmp_path):
    assert main(train(tmp_path / "single", sets, "train.steps=12", "threads=1")) == 0
    run = tmp_path / "elastic"
    for processes, steps in ((0, 4), (2, 9), (0, 12)):
        status, output = launch(processes, *train(run, sets, f"train.steps={steps}", "threads=1"))
        assert status == 0, output
    expected = {step: loss for step, loss, _ in rows(tmp_path / "single") if loss is not None}
    found = {step: loss for step, loss, _ in rows(run) if loss is not None}
    assert list(found) == list(expected)
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)
