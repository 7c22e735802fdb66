"""Keys that balance experts: an adaptation sets them anew, and a model without experts has none."""

import pytest

from scmdm.checkpoint.reader import find_model
from scmdm.cli import main
from scmdm.models.model_files import read_model
from tests.distributed.test_expert_ranks import EXPERTS

DECODER = [key for key in EXPERTS if "expert" not in key and "router" not in key]
RUN = ["train.global_batch_size=4", "train.micro_batch_size=4", "train.steps=1", "train.validate_every=0"]


@pytest.fixture
def run(tmp_path, molecules):
    """Train or adapt for a step; returns the exit status."""
    (tmp_path / "empty.yaml").write_text("{}\n")

    def run(command, name, *keys):
        return main(
            [command, str(tmp_path / "empty.yaml"), *RUN, *keys, f"data.path={molecules}", f"run_dir={tmp_path / name}"]
        )

    return run


def test_an_adaptation_balances_the_experts_of_its_base(run, tmp_path):
    assert run("train", "base", *EXPERTS) == 0
    keys = [f"base={tmp_path / 'base'}", "self_conditioning.rate=1", "model.kind=decoder"]
    assert run("adapt", "adapted", *keys, "model.router_loss=0.5", "model.router_bias_rate=0.25") == 0
    model = read_model(find_model(tmp_path / "adapted")).spec.model
    assert (model.experts, model.router_loss, model.router_bias_rate, model.router_z_loss) == (8, 0.5, 0.25, 0)


@pytest.mark.parametrize("key", ["router_loss", "router_z_loss", "router_bias_rate"])
def test_a_model_without_experts_has_nothing_to_balance(run, tmp_path, key, capsys):
    assert run("train", "refused", *DECODER, f"model.{key}=0.5") == 1
    error = capsys.readouterr().err
    assert f"model.{key}=0.5" in error and "model.experts=0" in error
    assert run("train", "base", *DECODER) == 0
    keys = [f"base={tmp_path / 'base'}", "self_conditioning.rate=1", "model.kind=decoder"]
    assert run("adapt", "refused", *keys, f"model.{key}=0.5") == 1
    assert f"model.{key}=0.5" in capsys.readouterr().err
