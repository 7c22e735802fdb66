"""The worked examples of docs/guides/extend: each diff applies to a copy of the repository, which then runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs/guides/extend"
COPIED = ("scmdm", "data_prep", "configs", "pyproject.toml")


@pytest.fixture
def extended(tmp_path):
    """Copy the repository and apply worked examples; returns a function that runs `scmdm` in the copy."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "scmdm", *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        run.errors = done.stderr
        return done.stdout

    def apply(*names):
        for name in names:
            subprocess.run(["git", "apply", str(EXAMPLES / f"{name}.diff")], cwd=checkout, check=True)
        run.checkout = checkout
        return run

    return apply


@pytest.mark.parametrize("diff", sorted(EXAMPLES.glob("*.diff")), ids=lambda path: path.stem)
def test_the_diff_applies(diff, tmp_path):
    for name in COPIED[:2]:
        shutil.copytree(ROOT / name, tmp_path / name)
    subprocess.run(["git", "apply", "--check", str(diff)], cwd=tmp_path, check=True)


RUN = """\
device: cpu
data: {path: data}
model: {width: 16, layers: 1, heads: 2}
ema: {decay: 0}
schedule: {warmup_steps: 0}
train:
  steps: 2
  global_batch_size: 8
  micro_batch_size: 8
  log_every: 1
  validate_every: 2
  validation_samples: 8
  checkpoint_every: 2
"""
TEXT = """\
out: data
source: {name: text, path: text.txt, unit: lines}
tokenizer: {name: characters}
length: 48
"""
NUMBERS = """\
out: data
source: {name: numbers, count: 400}
tokenizer: {name: characters}
length: 32
"""


def write(run, name, content):
    (run.checkout / name).write_text(content)


def losses(run, directory):
    rows = (run.checkout / directory / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


def prepare_text(run):
    lines = (f"line {number} of a text about the number {number * number}" for number in range(400))
    write(run, "text.txt", "\n".join(lines))
    write(run, "text.yaml", TEXT)
    write(run, "run.yaml", RUN)
    run("prepare", "text.yaml")


@pytest.mark.slow
def test_sampler(extended):
    run = extended("sampler")
    common = ("configs/qm9/base-model", "num=4", "device=cpu", "sampler.kind=left_to_right")
    texts = run("sample", *common, "sampler.steps=8").splitlines()
    assert len(texts) == 4
    assert texts == run("sample", *common, "sampler.steps=8", "batch_size=1").splitlines()


@pytest.mark.slow
def test_engine(extended):
    run = extended("engine")
    prepare_text(run)
    run("train", "run.yaml", "run_dir=plain", "engine=single")
    assert "Anomaly Detection" not in run.errors
    run("train", "run.yaml", "run_dir=checked", "engine=anomaly")
    assert "Anomaly Detection" in run.errors
    assert len(losses(run, "plain")) == 2
    assert losses(run, "checked") == losses(run, "plain")


@pytest.mark.slow
def test_denoiser(extended):
    run = extended("denoiser")
    prepare_text(run)
    run("train", "run.yaml", "run_dir=base", "model.kind=convolution", "model.kernel=5")
    assert len(losses(run, "base")) == 2
    write(run, "adapt.yaml", RUN.replace("model: {width: 16, layers: 1, heads: 2}", "self_conditioning: {rate: 1}"))
    run("adapt", "adapt.yaml", "base=base", "run_dir=adapted")
    assert "conditioned" in (run.checkout / "adapted/train.log").read_text()
    run("sample", "adapted", "num=2", "sampler.steps=4", "device=cpu", "out=samples.jsonl")
    assert len((run.checkout / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_source_and_domain(extended):
    run = extended("source", "domain")
    write(run, "numbers.yaml", NUMBERS)
    write(run, "run.yaml", RUN)
    run("prepare", "numbers.yaml")
    run("prepare", "--verify", "data")
    run("train", "run.yaml", "run_dir=base")
    options = ("domain=numbers", "num=8", "nelbo_samples=8", "device=cpu", "sampler.steps=4", "out=found.json")
    run("evaluate", "base", *options, "metrics.terms=4")
    found = json.loads((run.checkout / "found.json").read_text())
    assert found["config"]["metrics"] == {"terms": 4}
    assert "arithmetic" in json.dumps(found["samples"])
