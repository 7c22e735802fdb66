"""Codes of a VQ model: distances by hand and against scipy, and the whole way from `.npy` to `.npy`."""

import json

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from scmdm.cli import main
from scmdm.domains.codes.metrics import (
    CodeReference,
    code_counts,
    count_distance,
    measure_codes,
    pair_counts,
)

KEYS = [
    "source.name=codes",
    "tokenizer.name=codes",
    "length=13",
    "source.levels=9",
    "validation_fraction=0.2",
    "test_fraction=0.2",
]


def test_pairs_by_hand():
    codes = np.array([[[0, 1, 1], [2, 0, 1]]])
    outcomes, counts = pair_counts(codes, 3)
    found = dict(zip(outcomes.tolist(), counts.tolist(), strict=True))
    beside = {(0, 1): 2, (1, 1): 1, (2, 0): 1}
    below = {(0, 2): 1, (1, 0): 1, (1, 1): 1}
    by_hand = {2 * (3 * a + b): n for (a, b), n in beside.items()}
    assert found == by_hand | {2 * (3 * a + b) + 1: n for (a, b), n in below.items()}


def test_distances_are_scipys_jensenshannon():
    dice = np.random.default_rng(0)
    a, b = dice.integers(0, 6, (20, 3, 4)), dice.integers(2, 9, (30, 3, 4))
    p, q = (np.bincount(x.ravel(), minlength=9) for x in (a, b))
    assert count_distance(code_counts(a), code_counts(b)) == pytest.approx(jensenshannon(p, q))
    assert (
        count_distance(code_counts(a), code_counts(a)) == 0
        and count_distance(code_counts(a), code_counts(a[:0])) is None
    )
    assert count_distance(pair_counts(a, 9), pair_counts(a + 20, 9)) == pytest.approx(np.sqrt(np.log(2)))


def test_metrics_of_a_few_samples():
    """One code in two places of the training samples; one sample is a copy, one is not framed."""
    train, held_out = np.array([[[0, 1]], [[2, 3]]]), np.array([[[0, 1]], [[0, 1]], [[2, 3]]])
    samples = np.array([[[2, 3]], [[0, 3]], [[0, 0]]])
    measured = measure_codes(samples, [True, True, False], CodeReference.make(train, held_out, 8))
    found, values = measured.metrics, measured.values
    assert (found["num_samples"], found["num_framed"], found["num_copies"]) == (3, 2, 1)
    assert found["framed"] == pytest.approx(2 / 3) and found["copies"] == pytest.approx(1 / 3)
    assert found["codebook_used"] == 3 / 8 and found["codebook_used_floor"] == 4 / 8
    assert found["usage_distance"] == pytest.approx(jensenshannon([1, 0, 1, 2], [2, 2, 1, 1]))
    assert found["usage_distance_floor"] == pytest.approx(jensenshannon([1, 1, 1, 1], [2, 2, 1, 1]))
    assert found["pair_distance"] == pytest.approx(jensenshannon([0, 1, 1], [2, 1, 0]))
    assert values["framed"].value() == found["framed"] and values["copies"].value() == found["copies"]
    assert values["usage_distance"].array[1] == pytest.approx(jensenshannon([0, 0, 1, 1], [2, 2, 1, 1]))
    assert values["pair_distance"].array.tolist() == pytest.approx(
        [np.sqrt(np.log(2)), jensenshannon([0, 1], [2, 1]), found["pair_distance"]]
    )
    nothing = measure_codes(samples, [False] * 3, CodeReference.make(train, held_out, 8)).metrics
    assert nothing["pair_distance"] is None and nothing["codebook_used"] == 0


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_from_codes_to_codes(tmp_path, capsys, shape):
    """Prepared, trained, measured and sampled by the command line: codes of rows come back in rows."""
    dice = np.random.default_rng(0)
    rows = np.cumsum(dice.integers(0, 2, (120, 12)), axis=1) % 9
    np.save(tmp_path / "codes.npy", rows.reshape(-1, *shape).astype(np.uint16))
    (tmp_path / "empty.yaml").write_text("{}")
    data, run = tmp_path / "data", tmp_path / "run"
    empty = str(tmp_path / "empty.yaml")
    assert main(["prepare", empty, *KEYS, f"source.path={tmp_path / 'codes.npy'}", f"out={data}", "workers=1"]) == 0
    model = ["model.width=16", "model.layers=1", "model.heads=2", "model.condition_width=8"]
    train = ["train.steps=2", "train.global_batch_size=16", "train.micro_batch_size=16"]
    assert main(["train", empty, f"data.path={data}", f"run_dir={run}", *model, *train]) == 0
    out = tmp_path / "found.json"
    keys = ["num=20", "seeds=[0,1]", "nelbo_samples=8", "sampler.steps=4", f"out={out}"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "domain=codes", *keys]) == 0
    assert "codebook in use" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["domain"] == "codes" and len(result["samples"]) == 2
    assert 0 < result["samples"][0]["metrics"]["pair_distance_floor"] < 1
    assert main(["sample", str(run), "num=20", "sampler.steps=4", f"out={tmp_path / 'samples.jsonl'}"]) == 0
    assert main(["sample", str(run), "num=20", "sampler.steps=4", f"out={tmp_path / 'samples.npy'}"]) == 0
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    framed = [row for row in map(json.loads, lines) if row["framed"]]
    codes = np.load(tmp_path / "samples.npy", allow_pickle=False)
    assert codes.shape == (len(framed), *(shape if len(shape) == 2 else (1, *shape)))
    assert codes.reshape(len(framed), -1).tolist() == [list(map(int, row["text"].split())) for row in framed]
