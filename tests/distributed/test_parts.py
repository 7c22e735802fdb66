"""Adaptations of a part of the weights, and with a gradient through the estimate: sharded as on one process."""

import pytest

from scmdm.cli import main
from tests.distributed.launching import launch
from tests.distributed.parity import STEPS, assert_same

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "keys",
    [
        ["model.lora_rank=4"],
        pytest.param(["train.last_layers=1"], marks=pytest.mark.long),
        pytest.param(["train.last_layers=0"], marks=pytest.mark.long),
        pytest.param(
            ["self_conditioning.stop_gradient=false", "optimizer.conditioner_lr=0.03"], marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_two_ranks_that_are_interrupted_match_one_process(keys, adapt, tmp_path):
    assert main(adapt(tmp_path / "one", "train.micro_batch_size=64", *keys)) == 0
    for steps in (12, STEPS):
        status, output = launch(2, *adapt(tmp_path / "two", "train.micro_batch_size=16", f"train.steps={steps}", *keys))
        assert status == 0, output
    assert_same(tmp_path / "two", tmp_path / "one")
