"""The main job, small: worker processes, an interruption, the same command again."""

import functools
import json
import os
import shutil
import signal

import pytest
import yaml

from scmdm.cli import main
from scmdm.domains.sample_values import read_values
from scmdm.observability.run_metrics import last_row
from scmdm.system.run_directory import METRICS_FILE
from tests.conftest import ADAPTED, ROOT, TINY, scmdm
from tests.distributed.launching import are_gone, launch
from tests.processes import children, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def study(tmp_path, molecules, base):
    """Configuration of two arms, from the session's base and, with from_scratch, from one of its own."""
    return write_study(tmp_path, molecules, base)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, molecules, base):
    path, out = write_study(tmp_path_factory.mktemp("study"), molecules, base)
    finish(path)
    return out


def write_study(tmp_path, molecules, base):
    out = tmp_path / "study"
    data = {"extends": str(ROOT / "configs/data/qm9.yaml"), "out": str(molecules), "limit": 900, "length": 24}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**data, "validation_fraction": 0.1}))
    (tmp_path / "empty.yaml").write_text("{}\n")
    content = {
        "title": "Small",
        "out": str(out),
        "prepare": str(tmp_path / "data.yaml"),
        "base": str(base),
        "base_config": str(tmp_path / "empty.yaml"),
        "adapt_config": str(tmp_path / "empty.yaml"),
        "arms": {
            "vanilla": {"label": "vanilla"},
            "scmdm": {"label": "rate 1", "overrides": ["self_conditioning.rate=1"]},
            "float32": {"label": "float32", "samples_of": "scmdm", "sampler": ["gumbel=float32"]},
        },
        "steps": [2, 4],
        "sampling_seeds": [0, 1],
        "num": 32,
        "nelbo_samples": 32,
        "overrides": [*ADAPTED, "train.steps=30"],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, out


def finish(path, *overrides):
    status, output = launch(0, "study", path, *overrides, timeout=300)
    assert status == 0, output
    return output


def measured(out):
    """What must not depend on an interruption."""
    rows = json.loads((out / "study.json").read_text())["evaluations"]
    return [{key: row.get(key) for key in ("name", "nelbo", "metrics", "evaluations")} for row in rows]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_an_interrupted_study_leaves_nothing_running_and_goes_on(study, number, undisturbed):
    path, out = study
    # A shell that starts its tests in the background has them ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = scmdm("study", path, start_new_session=True, preexec_fn=heed)
    metrics, waiting = (out / name / METRICS_FILE for name in ("scmdm-0", "vanilla-0"))  # one worker, in this order
    wait_until(lambda: (last_row(metrics, "train") or {"step": 0})["step"] >= 8, process)
    workers = children(process.pid)
    assert workers
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert are_gone(workers)
    assert last_row(waiting, "train") is None
    output = finish(path)
    assert "rate 1 (" not in output and "scmdm-0_T4_s1" in output and "report: " in output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31))
    assert (out / "report.html").stat().st_size > 50_000
    assert "scmdm-0_T4_s1" not in finish(path)  # nothing is measured twice
    assert measured(out) == measured(undisturbed)


def test_samples_are_not_drawn_again_for_other_metrics(undisturbed, tmp_path):
    """But they are where their file was changed."""
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    for path in out.glob("evaluations/*.json"):
        row = json.loads(path.read_text())
        if row["kind"] == "samples":
            path.write_text(json.dumps(row | {"metrics_config": {"fcd": True}, "metrics": {}}))
    changed = out / "samples/base_T2_s0.jsonl"
    changed.write_text(changed.read_text().replace("C", "N", 1))
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("samples/*.jsonl")}
    finish(undisturbed.parent / "study.yaml", f"out={out}")
    assert measured(out) == measured(undisturbed)
    again = {path.name for path in out.glob("samples/*.jsonl") if path.stat().st_mtime_ns != written[path.name]}
    assert again == {changed.name}
    for path in out.glob("samples/*.jsonl"):
        assert path.read_bytes() == (undisturbed / "samples" / path.name).read_bytes()


@pytest.mark.long
def test_from_scratch_trains_the_base_first(study):
    path, out = study
    trained = {"base_overrides": [*TINY, "train.steps=6"], "overrides": [*ADAPTED, "train.steps=4"]}
    finish(path, "from_scratch=true", *(f"{key}={json.dumps(value)}" for key, value in trained.items()))
    assert last_row(out / "base" / METRICS_FILE, "train")["step"] == 6
    assert len(measured(out)) == 3 * 5 + 4


@pytest.mark.long
def test_arms_from_scratch_and_arms_that_only_sample(study):
    """`only` trains what it needs; an arm from scratch sees what base and adaptation have seen, one that samples trains
    nothing."""
    path, out = study
    content = yaml.safe_load(path.read_text())
    overrides = [*TINY, "self_conditioning.rate=1", "model.inject_at=masked"]
    content["arms"]["scratch"] = {"label": "from scratch", "from_scratch": True, "overrides": overrides}
    content |= {"steps": [2], "reference": "scmdm", "overrides": [*ADAPTED, "train.steps=4"]}
    content["base_overrides"] = [*TINY, "train.steps=6"]
    path.write_text(yaml.safe_dump(content))
    finish(path, "only=[float32,scratch]")
    assert not (out / "vanilla-0").exists() and not (out / "float32-0").exists()
    assert last_row(out / "scratch-0" / METRICS_FILE, "train")["step"] == 6 + 4
    content = json.loads((out / "study.json").read_text())
    rows = {row["name"]: row for row in content["evaluations"]}
    ours, theirs = rows["float32-0_T2_s0"], rows["scmdm-0_T2_s0"]
    assert ours["model_sha256"] == theirs["model_sha256"] and "float32-0_nelbo" not in rows
    assert (ours["sampler"]["gumbel"], theirs["sampler"]["gumbel"]) == ("float32", "float64")
    assert {arm["name"]: arm["rate"] for arm in content["arms"]} == {"base": 0, "scmdm": 1, "float32": 1, "scratch": 1}
    for row in (ours, theirs):
        values = read_values(out / row["values_file"])
        assert values["validity"].value() == row["metrics"]["validity"] and len(values["validity"].array) == 32
    report = (out / "report.html").read_text()
    assert "from scratch: trained from scratch" in report and "(samples of scmdm)" in report
    before = {path: path.stat().st_mtime_ns for path in (out / "evaluations").iterdir()}
    assert "vanilla" in finish(path)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (out / "evaluations").iterdir()}.items()


def test_a_mistake_in_a_worker_ends_the_study_in_one_line(study):
    path, _ = study
    process = scmdm("study", path, "overrides=" + json.dumps([*ADAPTED, "train.steps=4", "model.width=48"]))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("\n") == 1 and "model.width=48" in errors


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("split=nope", "no split 'nope'"),
        ("metric=valid", "metric='valid' is not possible"),
        ("metrics.scorer=/nope", "unknown key `scorer`"),
        ("metrics.fcd=maybe", "fcd='maybe'"),
        ("fcd=true", "metrics.fcd"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_trained(tmp_path, molecules, base, capsys, key, told):
    path, out = write_study(tmp_path, molecules, base)
    assert main(["study", str(path), key]) != 0
    assert told in capsys.readouterr().err
    assert not out.exists() or list(out.iterdir()) == []
