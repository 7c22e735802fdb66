"""Block diffusion on several ranks: the same noise, losses, weights and NELBO as on one process."""

import pytest

from scmdm.cli import main
from scmdm.observability.run_metrics import read_metrics
from tests.distributed.launching import launch
from tests.distributed.parity import STEPS, assert_same

pytestmark = pytest.mark.slow

KEYS = ["diffusion.block_length=5", "train.validate_every=10", "train.validation_samples=50"]


def nelbos(run):
    found = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "validation"]
    return [row[key] for row in found for key in ("nelbo_null", "nelbo_conditioned")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, adapt):
    run = tmp_path_factory.mktemp("runs") / "blocks"
    assert main(adapt(run, "train.micro_batch_size=64", *KEYS)) == 0
    return run


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_split_does_not_matter(processes, alone, adapt, tmp_path):
    status, output = launch(processes, *adapt(tmp_path / "run", "train.micro_batch_size=8", *KEYS), timeout=600)
    assert status == 0, output
    assert_same(tmp_path / "run", alone)
    assert nelbos(tmp_path / "run") == pytest.approx(nelbos(alone), rel=1e-5)


@pytest.mark.long
def test_the_number_of_ranks_may_change_at_every_restart(alone, adapt, tmp_path):
    for processes, steps in ((0, 6), (2, 9), (4, 15), (0, STEPS)):
        keys = ["train.micro_batch_size=16", f"train.steps={steps}", *KEYS]
        status, output = launch(processes, *adapt(tmp_path / "run", *keys), timeout=600)
        assert status == 0, output
    assert_same(tmp_path / "run", alone)
