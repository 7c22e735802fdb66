"""Real ranks on gloo share a study: its rows and samples are those of one process, also after a kill."""

import json
import os
import shutil
import signal

import pytest
import yaml

from scmdm.observability.run_metrics import last_row, read_metrics
from scmdm.system.run_directory import METRICS_FILE
from tests.cli.test_study import write_study
from tests.conftest import ADAPTED, TINY
from tests.distributed.launching import launch, start, workers
from tests.processes import wait_until

pytestmark = pytest.mark.slow
SMALL = ["train.micro_batch_size=8", "precision=float32"]


@pytest.fixture
def study(tmp_path, molecules, base):
    return write_small(tmp_path, molecules, base)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, molecules, base):
    """The study of one process, which trains its base first."""
    place = tmp_path_factory.mktemp("alone")
    run(0, write_small(place, molecules, base), "from_scratch=true")
    return place / "study"


def write_small(place, molecules, base):
    """Write the configuration of a small study: two arms, one of which samples the other's models."""
    path, _ = write_study(place, molecules, base)
    content = yaml.safe_load(path.read_text())
    del content["arms"]["vanilla"]
    content |= {"steps": [2], "sampling_seeds": [0], "num": 10, "nelbo_samples": 21}
    content["overrides"] = [*ADAPTED, *SMALL, "train.steps=4"]
    content["base_overrides"] = [*TINY, *SMALL, "train.steps=4"]
    path.write_text(yaml.safe_dump(content))
    return path


def run(ranks, path, *overrides):
    status, output = launch(ranks, "study", path, *overrides, timeout=900)
    assert status == 0, output
    return output


def rows(out):
    found = json.loads((out / "study.json").read_text())["evaluations"]
    return {row["name"]: {key: value for key, value in row.items() if key != "seconds"} for row in found}


def samples(out):
    return {path.name: path.read_bytes() for path in (out / "samples").glob("*.jsonl")}


def modified(out):
    return {path: path.stat().st_mtime_ns for path in (out / "evaluations").iterdir()}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_rows_and_samples_do_not_depend_on_the_ranks(alone, study, tmp_path, ranks):
    """The same weights are measured: the trained runs are copied, the measurements are not."""
    expected, out = rows(alone), tmp_path / "study"
    assert len(expected) == 5 and len(samples(alone)) == 3
    for model in ("base", "scmdm-0"):
        shutil.copytree(alone / model, out / model)
    output = run(ranks, study, "from_scratch=true")
    assert samples(out) == samples(alone)
    found = rows(out)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        nelbo, other = row.pop("nelbo", {}), expected[name].get("nelbo", {})
        assert row == {key: value for key, value in expected[name].items() if key != "nelbo"}
        assert nelbo.keys() == other.keys()
        for mode, value in nelbo.items():
            assert value == pytest.approx(other[mode], rel=1e-6)
    assert not list((out / "evaluations").glob(".*.parts"))
    assert len([line for line in output.splitlines() if line.startswith("scmdm-0_T2_s0 ")]) == 1, output
    assert (out / "report.html").stat().st_size > 50_000


def test_ranks_share_the_weights_of_what_they_measure(alone, study, tmp_path):
    out = tmp_path / "study"
    for model in ("base", "scmdm-0"):
        shutil.copytree(alone / model, out / model)
    run(2, study, "from_scratch=true", "shards=2", "weights_dtype=bfloat16")
    expected, found = rows(alone), rows(out)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        assert row["weights_dtype"] == "bfloat16"
        for mode, value in row.get("nelbo", {}).items():
            other = expected[name]["nelbo"][mode]["mean"]
            assert value["mean"] != other and value["mean"] == pytest.approx(other, rel=0.02)
    before = modified(out)
    run(0, study, "from_scratch=true", "weights_dtype=bfloat16")
    assert modified(out) == before
    run(0, study, "from_scratch=true")
    assert rows(out).keys() == expected.keys()
    assert {row["weights_dtype"] for row in rows(out).values()} == {"float32"}


def test_a_killed_study_of_two_ranks_goes_on(alone, study, tmp_path):
    """Base and arm are trained by both ranks, in process groups that follow each other."""
    out = tmp_path / "study"
    process = start(2, "study", study, "from_scratch=true")
    metrics = out / "scmdm-0" / METRICS_FILE
    wait_until(lambda: (last_row(metrics, "train") or {"step": 0})["step"] >= 2, process, limit=600)
    for pid in (process.pid, *workers(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    before = modified(out)
    assert {path.name for path in before} >= {"base_nelbo.json", "base_T2_s0.json"}
    assert not (out / "study.json").exists()
    run(2, study, "from_scratch=true")
    assert before.items() <= modified(out).items()
    expected, found = rows(alone), rows(out)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        for mode, value in row.get("nelbo", {}).items():
            assert value["mean"] == pytest.approx(expected[name]["nelbo"][mode]["mean"], rel=1e-3)
    for model in ("base", "scmdm-0"):
        losses, others = (list(read_metrics(place / model / METRICS_FILE)) for place in (out, alone))
        assert [row["step"] for row in losses] == [1, 2, 3, 4]
        assert [row["loss"] for row in losses] == pytest.approx([row["loss"] for row in others], rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "keys", "named"),
    [
        (3, [], "arms.scmdm"),  # the batch cannot be shared
        (2, ["shards=3"], "shards=3"),
        (2, ["overrides=" + json.dumps([*ADAPTED, *SMALL, "train.steps=4", "model.width=48"])], "model.width"),
    ],
    ids=["plan", "shards", "training"],
)
def test_a_mistake_ends_all_ranks_with_one_line(study, ranks, keys, named):
    status, output = launch(ranks, "study", study, "base_overrides=[]", *keys, timeout=600)
    errors = [line for line in output.splitlines() if line.startswith("scmdm: error:")]
    assert status == 1 and len(errors) == 1 and named in errors[0], output
    assert "Traceback" not in output


@pytest.mark.long
def test_an_engine_is_built_again_in_the_same_processes(study, tmp_path):
    """Two trainings with ZeRO stage 3, whose library keeps process groups of its own, and then two with FSDP2."""
    pytest.importorskip("deepspeed")
    content = yaml.safe_load(study.read_text())
    overrides = ["self_conditioning.rate=1", "engine=deepspeed", "deepspeed.stage=3"]
    content["arms"] = {"zero": {"label": "ZeRO", "overrides": overrides}, **content["arms"]}
    content |= {"adaptation_seeds": [0, 1], "base_overrides": []}
    study.write_text(yaml.safe_dump(content))
    run(2, study)
    found = rows(tmp_path / "study")
    for seed in (0, 1):
        zero, fsdp = (found[f"{arm}-{seed}_nelbo"]["nelbo"] for arm in ("zero", "scmdm"))
        for mode, value in zero.items():
            assert value["mean"] == pytest.approx(fsdp[mode]["mean"], rel=1e-3)
