"""What is installed from the wheel finds its configurations and base models, from any directory."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

from scmdm.config.shipped import shipped_names
from tests.conftest import ROOT

LARGEST_WHEEL = 60e6  # bytes


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Packages of the wheel, unpacked, with a working directory beside them."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("scmdm", "data_prep", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", place, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    assert wheel.stat().st_size < LARGEST_WHEEL
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    shutil.rmtree(source)
    (place / "work").mkdir()
    return place


@pytest.fixture
def work(installed):
    folder = installed / "work"
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def run(work, *arguments, status=0):
    environment = {**os.environ, "PYTHONPATH": str(work.parent / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scmdm", *map(str, arguments)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_every_shipped_file_is_listed(work):
    listed = [line.split()[0] for line in run(work, "configs").splitlines()[:-1]]
    assert listed == list(shipped_names()) and len(listed) > 40
    assert run(work, "configs", "list").splitlines()[:-1] == run(work, "configs").splitlines()[:-1]


@pytest.mark.slow
def test_a_chain_of_files(work):
    error = run(work, "train", "configs/text/lm1b-base.yaml", "data.path=nothing", "run_dir=run", status=1)
    assert "nothing" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_name_that_is_not_there(work):
    error = run(work, "train", "configs/qm9/bse.yaml", status=1)
    assert "configs/qm9/base.yaml" in error and str(work.parent / "site") in error and error.count("\n") == 1
    error = run(work, "sample", "configs/qm9/base-modl", status=1)
    assert "configs/qm9/base-model" in error and str(work.parent / "site") in error and error.count("\n") == 1
    assert "scmdm" in run(work, "study", "configs/qm9/quickstart.yaml", "only=[none]", status=1)


@pytest.mark.slow
def test_a_base_model_is_sampled(work):
    assert len(run(work, "sample", "configs/qm9/base-model", "num=2", "sampler.steps=2").splitlines()) == 2
    assert not list(work.iterdir())


@pytest.mark.slow
def test_a_tokenizer_of_a_shipped_model(work):
    (work / "play.txt").write_text("".join(f"ROMEO: line {n}\n\n" for n in range(9000)))
    run(work, "prepare", "configs/data/shakespeare_chars.yaml", "source.path=play.txt", "out=data", "workers=1")
    assert (work / "data/manifest.json").is_file()


@pytest.mark.slow
def test_a_launch_carries_the_base(work):
    """The frozen configuration names the copy, which another machine has, and the code is without configurations."""
    options = ["base=configs/qm9/base-model", "run_dir=run", "data.path=nothing"]
    error = run(work, "launch", "local", "adapt", "configs/qm9/adapt.yaml", *options, status=1)
    assert "nothing" in error
    (launch,) = (work / "run/launch").iterdir()
    base = yaml.safe_load((launch / "config.yaml").read_text())["base"]
    assert base == str(launch / "base") and (launch / "base/model.json").is_file()
    assert not (launch / "code/scmdm/configs").exists()


@pytest.mark.slow
def test_a_copy_wins(work):
    run(work, "configs", "copy", "qm9/base.yaml", "configs/model", "qm9/base-model")
    assert (work / "configs/qm9/base-model/weights.safetensors").is_file()
    assert len(list((work / "configs/model").iterdir())) == len(list((ROOT / "configs/model").iterdir()))
    assert "exists" in run(work, "configs", "copy", "qm9/base.yaml", status=1)
    assert run(work, "configs", "copy", "qm9/nothing", status=1).count("\n") == 1
    (work / "configs/model/8b.yaml").write_text("model: {widht: 3}\n")
    assert "widht" in run(work, "plan", "configs/model/8b.yaml", "--vocab", 100, "--length", 128, status=1)
    run(work, "configs", "copy", "--to", "elsewhere")
    assert (work / "elsewhere/configs/arms.yaml").is_file()
