"""A mixture of experts in one process and sharded over 2 and 4 ranks, with a change of their number in between."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks.counting import fake_ranks
from scmdm.checkpoint.reader import find_model
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.run import RunConfig
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.experts.router import routers_of
from scmdm.models.model_files import ModelSpec
from scmdm.training.setup import build_engine
from tests.distributed.launching import launch
from tests.distributed.parity import BATCH, STEPS, assert_same, rows
from tests.weights import weights_of

EXPERTS = [
    "model.kind=decoder",
    "model.width=32",
    "model.layers=2",
    "model.heads=4",
    "model.mlp_width=48",
    "model.experts=8",
    "model.experts_per_token=2",
    "model.expert_width=16",
    "model.shared_experts=1",
    "model.router=sigmoid",
    "model.router_groups=4",
    "model.router_top_groups=2",
    "model.router_bias=true",
    "model.router_bias_rate=0.01",
    "model.router_loss=0.01",
    "model.router_z_loss=0.001",
]


@pytest.mark.slow
def test_experts_train_on_two_and_on_four_ranks_as_in_one_process(tmp_path, molecules, empty_yaml):
    """Losses, norms, weights, averages, the routers' biases and the loads; resumed on twice as many ranks."""
    fixed = [f"data.path={molecules}", *EXPERTS, "self_conditioning.rate=0.5", "precision=float32"]
    fixed += [f"train.global_batch_size={BATCH}", "optimizer.lr=3e-3", "ema.decay=0.9", "train.log_every=1"]
    fixed += ["train.validate_every=0", "seed=3"]
    for run, ranks, own in (
        ("single", 0, [f"train.micro_batch_size={BATCH}", f"train.steps={STEPS}"]),
        ("sharded", 2, ["train.micro_batch_size=16", f"train.steps={STEPS // 2}"]),
        (
            "sharded",
            4,
            ["train.micro_batch_size=16", f"train.steps={STEPS}", "model.activation_checkpointing=full"],
        ),
    ):
        status, output = launch(ranks, "train", str(empty_yaml), f"run_dir={tmp_path / run}", *fixed, *own)
        assert status == 0, output
    assert_same(tmp_path / "sharded", tmp_path / "single")
    for one, two in zip(rows(tmp_path / "sharded"), rows(tmp_path / "single"), strict=True):
        for key in ("expert_entropy", "expert_max_share", "dropped_tokens"):
            assert one[key] == pytest.approx(two[key], rel=1e-2), one["step"]
    weights = weights_of(find_model(tmp_path / "sharded"))
    bias = weights["blocks.1.experts.router.balance.expert_bias"]
    assert bias.any()
    torch.testing.assert_close(100 * bias, (100 * bias).round(), rtol=0, atol=1e-3)  # whole updates


@pytest.fixture
def four_ranks():
    with fake_ranks(4):
        yield


def test_a_rank_holds_a_share_of_the_experts_and_the_whole_bias(four_ranks):
    """In bfloat16, routers are gathered in float32."""
    config = RunConfig(run_dir="unused", engine="fsdp2")
    config.model = DecoderConfig(
        width=16, layers=2, heads=2, mlp_width=24, experts=8, experts_per_token=2, router_bias=True
    )
    spec = ModelSpec(config.model, DiffusionConfig(), 12, 11, 8)
    engine = build_engine(config, spec, None, torch.device("cpu"), torch.bfloat16)
    held = {name: value.to_local().shape[0] for name, value in engine.parameters().items() if ".experts." in name}
    assert {held[f"blocks.{n}.experts.{part}.weight"] for n in range(2) for part in ("gate", "up", "down")} == {2}
    biases = engine.frozen()
    assert sorted(biases) == [f"blocks.{n}.experts.router.balance.expert_bias" for n in range(2)]
    assert all(not isinstance(value, DTensor) and value.tolist() == [0.0] * 8 for value in biases.values())
    seen = {}
    routers_of(engine.model)[0].register_forward_hook(lambda m, _, out: seen.update(weight=m.weight.dtype, out=out))
    state = State(torch.full((2, 8), 11), torch.ones(2).double())
    with engine.compute(), torch.no_grad():
        engine.denoiser.estimate(state)
    assert seen["weight"] == torch.float32 and seen["out"].weights_NT.dtype == torch.float32


def test_deepspeed_is_refused():
    config = RunConfig(run_dir="unused", engine="deepspeed", model=DecoderConfig(width=16, heads=2, experts=8))
    with pytest.raises(UserError, match="engine=deepspeed"):
        build_engine(
            config, ModelSpec(config.model, DiffusionConfig(), 12, 11, 8), None, torch.device("cpu"), torch.float32
        )
