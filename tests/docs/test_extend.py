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


RUNNER = """
import json, sys
from scmdm.cli import main

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        status = main(arguments)
        for stream in (sys.stdout, sys.stderr):
            print(chr(0), end="", file=stream)
        if status:
            sys.exit(status)
"""


@pytest.fixture
def extended(tmp_path):
    """Copy the repository and apply worked examples; returns the copy, and a function that runs commands in it.

    All in one process, because its start takes longer than most commands; it returns output and errors of each.
    """
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    (checkout / "runner.py").write_text(RUNNER)

    def run(*commands):
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "runner.py", json.dumps([line.split() for line in commands])]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return list(zip(done.stdout.split("\0"), done.stderr.split("\0"), strict=True))[:-1]

    def apply(*names):
        for name in names:
            subprocess.run(["git", "apply", str(EXAMPLES / f"{name}.diff")], cwd=checkout, check=True)
        return checkout, run

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


def losses(checkout, directory):
    rows = (checkout / directory / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


def write_text(checkout):
    lines = (f"line {number} of a text about the number {number * number}" for number in range(400))
    (checkout / "text.txt").write_text("\n".join(lines))
    (checkout / "text.yaml").write_text(TEXT)
    (checkout / "run.yaml").write_text(RUN)


@pytest.mark.slow
def test_sampler(extended):
    _, run = extended("sampler")
    command = "sample configs/qm9/base-model num=4 device=cpu sampler.kind=left_to_right sampler.steps=8"
    (texts, _), (again, _) = run(command, f"{command} batch_size=1")
    assert len(texts.splitlines()) == 4 and texts == again


@pytest.mark.slow
def test_engine(extended):
    checkout, run = extended("engine")
    write_text(checkout)
    _, plain, checked = run(
        "prepare text.yaml",
        "train run.yaml run_dir=plain engine=single",
        "train run.yaml run_dir=checked engine=anomaly",
    )
    assert "Anomaly Detection" not in plain[1] and "Anomaly Detection" in checked[1]
    assert len(losses(checkout, "plain")) == 2
    assert losses(checkout, "checked") == losses(checkout, "plain")


@pytest.mark.slow
def test_denoiser(extended):
    checkout, run = extended("denoiser")
    write_text(checkout)
    adapted = RUN.replace("model: {width: 16, layers: 1, heads: 2}", "self_conditioning: {rate: 1}")
    (checkout / "adapt.yaml").write_text(adapted)
    run(
        "prepare text.yaml",
        "train run.yaml run_dir=base model.kind=convolution model.kernel=5",
        "adapt adapt.yaml base=base run_dir=adapted",
        "sample adapted num=2 sampler.steps=4 device=cpu out=samples.jsonl",
    )
    assert len(losses(checkout, "base")) == 2
    assert "conditioned" in (checkout / "adapted/train.log").read_text()
    assert len((checkout / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_source_and_domain(extended):
    checkout, run = extended("source", "domain")
    (checkout / "numbers.yaml").write_text(NUMBERS)
    (checkout / "run.yaml").write_text(RUN)
    options = "domain=numbers num=8 nelbo_samples=8 device=cpu sampler.steps=4 out=found.json"
    run(
        "prepare numbers.yaml",
        "prepare --verify data",
        "train run.yaml run_dir=base",
        f"evaluate base {options} metrics.terms=4",
    )
    found = json.loads((checkout / "found.json").read_text())
    assert found["config"]["metrics"] == {"terms": 4}
    assert "arithmetic" in json.dumps(found["samples"])
