"""ZeRO computes what the other engines compute, and reads and writes their checkpoints."""

import importlib.util

import pytest
import torch

from scmdm.checkpoint.seal import SEAL, seal
from scmdm.cli import main
from scmdm.config.conversion import ExportConfig
from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.convert.exporter import export_model
from scmdm.distributed.deepspeed import deepspeed_json
from scmdm.errors import UserError
from scmdm.models.model_files import WEIGHTS_FILE
from scmdm.models.safetensors_shards import write_shards
from scmdm.observability.run_metrics import read_metrics
from scmdm.system.process_group import World
from scmdm.training.setup import resolve_engine
from tests.distributed.launching import launch
from tests.distributed.parity import CASES, STEPS, assert_same
from tests.weights import weights_of

installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
TWO = World(rank=0, size=2, local_rank=0)


def config_of(*overrides):
    keys = ["run_dir=r", "data.path=d", "train.steps=10", "engine=deepspeed", "train.micro_batch_size=8"]
    return load_config(RunConfig, None, [*keys, *overrides])


def test_the_json_follows_the_configuration():
    config = config_of("deepspeed.stage=3", "deepspeed.param_persistence_threshold=7", "optimizer.clip=0.5")
    found = deepspeed_json(config, 2, torch.bfloat16)
    assert found["train_micro_batch_size_per_gpu"] == 8
    assert found["gradient_accumulation_steps"] == 4
    assert found["train_batch_size"] == 64
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"] == {"stage": 3, "stage3_param_persistence_threshold": 7}
    assert found["torch_autocast"]["enabled"] and found["torch_autocast"]["dtype"] == "torch.bfloat16"
    assert "scmdm.models.linear.Linear" in found["torch_autocast"]["lower_precision_safe_modules"]
    assert "optimizer" not in found and "scheduler" not in found


def test_the_json_of_a_two_pass_run_does_not_prefetch():
    found = deepspeed_json(config_of("deepspeed.stage=3", "self_conditioning.rate=0.5"), 2, torch.float32)
    assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == 0
    assert not found["torch_autocast"]["enabled"]
    assert deepspeed_json(config_of("deepspeed.stage=1"), 2, torch.float32)["zero_optimization"] == {"stage": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed.stage=0"], "deepspeed.stage=0 is not possible; it must be between 1 and 3"),
        (["fsdp.replicate=2"], "fsdp.replicate=2 is not possible; it must be left out with engine=deepspeed"),
        (["fsdp.reshard_after_estimate=true"], "fsdp.reshard_after_estimate=true is not possible"),
        (["deepspeed.stage=3", "model.compile=block"], "model.compile='block' is not possible; it must be none with"),
        (["model.matmul_precision=fp8"], "model.matmul_precision='fp8' is not possible; it must be compute with"),
    ],
)
def test_impossible_combinations_are_named(overrides, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        config_of(*overrides)


@installed
def test_a_batch_that_the_ranks_cannot_divide_is_refused():
    with pytest.raises(UserError, match="a multiple of 2 x"):
        resolve_engine(config_of("train.micro_batch_size=64"), TWO)


def test_without_deepspeed_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        resolve_engine(config_of(), TWO)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.engine == "deepspeed"], ids=str)
def test_losses_and_weights_are_those_of_one_process(case, adapt, single, tmp_path):
    status, output = launch(case.processes, *adapt(tmp_path / "run", *case.overrides))
    assert status == 0, output
    assert_same(tmp_path / "run", single)


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    "rate", [pytest.param(0, marks=pytest.mark.long), 0.5, pytest.param(1, marks=pytest.mark.long)]
)
def test_stage_3_gathers_correctly_for_every_order_of_passes(rate, adapt, tmp_path):
    """Loss passes with and without a no-grad pass before them, validation with averaged weights in between."""
    keys = [f"self_conditioning.rate={rate}", "train.validate_every=2", "train.micro_batch_size=16", "train.steps=6"]
    assert main(adapt(tmp_path / "one", *keys)) == 0
    sharded = ["engine=deepspeed", "deepspeed.stage=3", "deepspeed.param_persistence_threshold=100"]
    status, output = launch(2, *adapt(tmp_path / "two", *keys, *sharded))
    assert status == 0, output
    ours, theirs = (list(read_metrics(tmp_path / run / "metrics.jsonl")) for run in ("two", "one"))
    assert [row["kind"] for row in ours] == [row["kind"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "nelbo_null", "nelbo_conditioned"):
            if (expected := b.get(key)) is not None:
                assert a[key] == pytest.approx(expected, rel=1e-5), (a["kind"], a["step"], key)


@installed
@pytest.mark.slow
@pytest.mark.long
def test_a_run_may_change_engine_stage_and_number_of_ranks_at_every_restart(adapt, single, tmp_path):
    legs = [
        (0, 3, []),
        (2, 6, ["engine=deepspeed", "deepspeed.stage=3", "deepspeed.param_persistence_threshold=0"]),
        (2, 9, ["engine=fsdp2"]),
        (2, 12, ["engine=deepspeed", "deepspeed.stage=1"]),
        (4, 15, ["engine=deepspeed", "deepspeed.stage=3"]),
        (2, 18, ["engine=deepspeed", "deepspeed.stage=2"]),
        (0, STEPS, []),
    ]
    for processes, steps, overrides in legs:
        keys = ["train.micro_batch_size=16", f"train.steps={steps}", *overrides]
        status, output = launch(processes, *adapt(tmp_path / "run", *keys))
        assert status == 0, output
    assert_same(tmp_path / "run", single)


@installed
@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(adapt, base, tmp_path):
    broken = export_model(base, tmp_path / "broken", ExportConfig())
    weights = weights_of(broken)
    weights["blocks.0.mlp.0.weight"].fill_(3e38)  # finite, as a base must be, but their products are not
    write_shards(broken / WEIGHTS_FILE, weights.items(), limit=10**9)
    (broken / SEAL).unlink()
    seal(broken)
    keys = [f"base={broken}", "engine=deepspeed", "train.micro_batch_size=32"]
    status, output = launch(2, *adapt(tmp_path / "run", *keys))
    assert status != 0 and "is not finite" in output, output
