"""Real processes on gloo: what is carried, by whom and how it is mixed gives the same run on every engine and split."""

import importlib.util

import pytest

from scmdm.cli import main
from tests.distributed.launching import launch
from tests.distributed.parity import Case, assert_same

pytestmark = pytest.mark.slow

HIDDEN = ("self_conditioning.preset=loopholing", "self_conditioning.perturbation=0.3")
MIXED = ("self_conditioning.preset=soft_masking", "self_conditioning.rollout_steps=2", *HIDDEN[1:])
BASE = ("self_conditioning.preset=residual_context", "optimizer.conditioner_lr=0.05")
ADAPTERS = (*BASE, "model.lora_rank=2")
SPLITS = [
    Case("fsdp2", 2, 16),
    Case("fsdp2", 2, 32, ("fsdp.context=2", "model.activation_checkpointing=full")),
    Case("fsdp2", 2, 16, ("fsdp.reshard_after_estimate=true", "fsdp.offload=true")),
    Case("deepspeed", 2, 32, ("deepspeed.stage=2",)),
    Case("deepspeed", 2, 16, ("deepspeed.stage=3", "deepspeed.param_persistence_threshold=0")),
]
METHODS = {"hidden": HIDDEN, "mixed": MIXED, "base": BASE, "adapters": ADAPTERS}
QUICK = {("base", 0), ("mixed", 1), ("mixed", 4)}  # the others take minutes, and are marked


def cases():
    for name, keys in METHODS.items():
        for number, split in enumerate(SPLITS):
            if split.engine == "deepspeed" and keys in (BASE, ADAPTERS):
                continue  # refused
            marks = () if (name, number) in QUICK else pytest.mark.long
            yield pytest.param(name, split, marks=marks, id=f"{name}: {split}")


@pytest.fixture(scope="module")
def references(tmp_path_factory, adapt):
    """Runs in one process, by method, made when they are needed."""
    made = {}

    def reference(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / "single"
            assert main(adapt(made[name], "train.micro_batch_size=64", *METHODS[name])) == 0
        return made[name]

    return reference


@pytest.mark.parametrize(("name", "case"), cases())
def test_losses_and_weights_do_not_depend_on_the_split(name, case, adapt, references, tmp_path):
    if case.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    status, output = launch(case.processes, *adapt(tmp_path / "run", *case.overrides, *METHODS[name]))
    assert status == 0, output
    assert_same(tmp_path / "run", references(name))
