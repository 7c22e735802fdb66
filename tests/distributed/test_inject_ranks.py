"""Real processes on gloo: an estimate that enters at a later block gives the same run on every engine and split."""

import importlib.util

import pytest

from scmdm.cli import main
from tests.distributed.launching import launch
from tests.distributed.parity import Case, assert_same

pytestmark = pytest.mark.slow

ENTERS = ("model.inject_layer=1", "model.conditioner=norm")
CASES = [
    Case("fsdp2", 2, 16),
    Case("fsdp2", 2, 32, ("fsdp.reshard_after_estimate=true", "model.activation_checkpointing=selective")),
    Case("fsdp2", 2, 32, ("fsdp.context=2", "model.activation_checkpointing=full")),
    Case("deepspeed", 2, 32, ("deepspeed.stage=1",)),
    Case("deepspeed", 2, 16, ("deepspeed.stage=2",)),
    Case("deepspeed", 2, 16, ("deepspeed.stage=3", "deepspeed.param_persistence_threshold=0")),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, adapt):
    """Reference run in one process."""
    run = tmp_path_factory.mktemp("runs") / "single"
    assert main(adapt(run, "train.micro_batch_size=64", *ENTERS)) == 0
    return run


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if number in (0, 5) else pytest.mark.long) for number, case in enumerate(CASES)],
    ids=str,
)
def test_losses_and_weights_do_not_depend_on_the_split(case, adapt, whole, tmp_path):
    if case.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    status, output = launch(case.processes, *adapt(tmp_path / "run", *case.overrides, *ENTERS))
    assert status == 0, output
    assert_same(tmp_path / "run", whole)
