"""Small real data sets and a small trained base, made once per session."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from scmdm.cli import main
from tests.processes import end, popen, started

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("scmdm", deadline=None)
hypothesis.settings.load_profile("scmdm")

TINY = [
    "model.width=32",
    "model.layers=2",
    "model.heads=2",
    "model.condition_width=8",
    "schedule.warmup_steps=2",
    "ema.decay=0.9",
    "device=cpu",
    "train.global_batch_size=64",
    "train.micro_batch_size=32",
    "train.log_every=1",
    "train.validate_every=0",
    "train.checkpoint_every=5",
]
ADAPTED = [key for key in TINY if not key.startswith("model.")]
ROOT = Path(__file__).parent.parent


def prepare_qm9(out, *overrides):
    config = str(ROOT / "configs/data/qm9.yaml")
    return main(["prepare", config, f"out={out}", "limit=900", "validation_fraction=0.1", "length=24", *overrides])


def small_base(place):
    """For commands without pytest, in `place`: `empty.yaml`, 900 molecules in `qm9`, and `base` after a few steps."""
    (place / "empty.yaml").write_text("{}\n")
    assert prepare_qm9(place / "qm9") == 0
    keys = [f"run_dir={place / 'base'}", f"data.path={place / 'qm9'}", "train.steps=6", *TINY]
    assert main(["train", str(place / "empty.yaml"), *keys]) == 0


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    """Fixtures of modules are made before this one, and their processes go on."""
    before = started()
    yield
    end([process for process in started() if process not in before])


@pytest.fixture(scope="session")
def molecules(tmp_path_factory):
    """900 molecules of QM9."""
    out = tmp_path_factory.mktemp("data") / "qm9"
    assert prepare_qm9(out) == 0
    return out


@pytest.fixture(scope="session")
def empty_yaml(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "empty.yaml"
    path.write_text("{}\n")
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory, molecules, empty_yaml):
    """A vanilla base after a few steps."""
    run = tmp_path_factory.mktemp("runs") / "base"
    assert main(["train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", "train.steps=6", *TINY]) == 0
    return run


@pytest.fixture
def published_moses(tmp_path, monkeypatch):
    """MOSES' package in small, as the user's cache has it; returns that cache."""
    cache = tmp_path / "cache"
    folder = cache / "scmdm/molsets-0.3.1"
    folder.mkdir(parents=True)
    for split, smiles in (
        ("train", ["CC1Oc2ccc(Cl)cc2N(CC(O)CO)C1=O", "Cn1cnc2c1c(=O)n(CC(O)CO)c(=O)n2C", "CCO", "CC1CC1"]),
        ("test", ["COc1ccccc1OC(=O)c1ccccc1OC(C)=O", "CC1C2CCC(C2)C1CN(CCO)C(=O)c1ccc(Cl)cc1", "CCN"]),
        ("test_scaffolds", ["O=C(C1CCCCC1)N1CC(=O)N2CCCc3ccccc3C2C1", "CCCN"]),
    ):
        (folder / f"{split}.csv").write_text("\n".join(["SMILES", *smiles]) + "\n")
    (folder / "mcf.csv").write_text("names,smarts\nMCF7,[#6&!H0]=[#8]\n")
    # As in the published file, spaces stand between the closing quote and the comma.
    (folder / "wehi_pains.csv").write_text('"c:1:c:c:c:c:c:1-[#7]=[#7]"   ,"<regId=azo(1)>"\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def scmdm(*arguments, output=subprocess.PIPE, **options):
    """The command line in its own process, whose standard output goes to `output`."""
    command = [sys.executable, "-m", "scmdm", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return popen(command, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, **options)
