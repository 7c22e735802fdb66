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
        return done.stdout

    def apply(*names):
        for name in names:
            subprocess.run(["git", "apply", str(EXAMPLES / f"{name}.diff")], cwd=checkout, check=True)
        run.checkout = checkout
        return run

    return apply


TINY = ("model.width=16", "model.layers=1", "model.heads=2", "device=cpu", "ema.decay=0", "wandb.mode=disabled")
STEPS = (
    "train.steps=2",
    "train.global_batch_size=8",
    "train.micro_batch_size=8",
    "train.log_every=1",
    "train.validate_every=2",
    "train.validation_samples=8",
    "train.checkpoint_every=2",
    "schedule.warmup_steps=0",
)


def losses(run, directory):
    rows = (run.checkout / directory / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


def prepare_text(run):
    text = "\n".join(f"line {number} of a text about the number {number * number}" for number in range(400))
    (run.checkout / "text.txt").write_text(text)
    (run.checkout / "text.yaml").write_text(
        "{out: data/text, source: {name: text, path: text.txt, unit: lines}, tokenizer: {name: characters},"
        " length: 48, pad_policy: loss}"
    )
    run("prepare", "text.yaml")


def test_sampler(extended):
    run = extended("sampler")
    common = ("configs/qm9/base-model", "num=4", "device=cpu", "sampler.kind=left_to_right")
    texts = run("sample", *common, "sampler.steps=8").splitlines()
    assert len(texts) == 4
    # With a step for each position, every token follows those on its left: a prefix given as prompt changes nothing.
    first = run("sample", *common, "sampler.steps=31", "batch_size=1").splitlines()
    assert first == run("sample", *common, "sampler.steps=31").splitlines()


def test_engine(extended):
    run = extended("engine")
    prepare_text(run)
    for engine in ("single", "anomaly"):
        run("train", "configs/text/base.yaml", "data.path=data/text", f"run_dir={engine}", f"engine={engine}", *TINY, *STEPS)
    assert losses(run, "anomaly") == losses(run, "single")
    assert len(losses(run, "single")) == 2


def test_denoiser(extended):
    run = extended("denoiser")
    prepare_text(run)
    common = ("data.path=data/text", "model.kind=convolution", "model.kernel=5", *TINY, *STEPS)
    run("train", "configs/text/base.yaml", "run_dir=base", *common)
    assert len(losses(run, "base")) == 2
    adapted = ("data.path=data/text", "base=base", "run_dir=adapted", "device=cpu", "ema.decay=0", *STEPS)
    run("adapt", "configs/text/adapt.yaml", *adapted)
    assert len(run("sample", "adapted", "num=2", "sampler.steps=4", "device=cpu").splitlines()) >= 2


def test_source_and_domain(extended):
    run = extended("source", "domain")
    (run.checkout / "numbers.yaml").write_text(
        "{out: data/numbers, source: {name: numbers, count: 400}, tokenizer: {name: characters}, length: 32}"
    )
    run("prepare", "numbers.yaml")
    run("prepare", "--verify", "data/numbers")
    common = ("data.path=data/numbers", "run_dir=base", *TINY, *STEPS)
    run("train", "configs/text/base.yaml", *common)
    run("evaluate", "base", "num=8", "nelbo_samples=8", "device=cpu", "sampler.steps=4", "out=found.json", "metrics.terms=4")
    found = json.loads((run.checkout / "found.json").read_text())
    assert found["domain"] == "numbers"
    assert "arithmetic" in json.dumps(found)
