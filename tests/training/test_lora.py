"""Training a part of a base: what changes, what is kept of it, adapters in a checkpoint, an export and peft's files."""

import json

import pytest
import torch

from scmdm.checkpoint.reader import find_model
from scmdm.cli import main
from scmdm.config.run import RunConfig
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.lora import add_adapters, freeze, is_added, merged
from scmdm.models.model_files import read_model
from scmdm.models.tensor_files import tensor_shapes
from tests.conftest import ADAPTED
from tests.weights import load_weights, weights_of

MASK = 9
LORA = ["model.lora_rank=4", "model.lora_alpha=16", "optimizer.lr=0.02"]


def model_of(**overrides):
    config = DiTConfig(width=16, layers=2, heads=2, condition_width=8, **overrides)
    model = DiT(config, vocab_size=10, mask_id=MASK, schedule=LogLinear())
    if config.lora_rank:
        add_adapters(model.blocks, config)
    init_weights(model, 0)
    return model


def run_config(model, last_layers=None):
    config = RunConfig(model=model.config)
    config.train.last_layers = last_layers
    return config


def test_a_fresh_adapter_changes_nothing_and_its_merge_what_it_did():
    base = model_of()
    with torch.no_grad():
        for index, parameter in enumerate(base.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    model = model_of(lora_rank=3, lora_alpha=6.0)
    load_weights(model, dict(base.named_parameters()), "base", new_conditioner=True)
    z, t = torch.randint(0, 10, (4, 8), generator=torch.Generator().manual_seed(0)), torch.rand(4).double()
    assert torch.equal(model.hidden(State(z, t)), base.hidden(State(z, t)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted = model.hidden(State(z, t))
    assert not torch.allclose(adapted, base.hidden(State(z, t)), atol=0.1)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    load_weights(base, dict(merged(sorted(weights.items()), model.config)), "merged")
    torch.testing.assert_close(base.hidden(State(z, t)), adapted, rtol=1e-4, atol=1e-4)
    part = model.blocks[1].mlp[2]
    expected = weights["blocks.1.mlp.2.weight"] + 2 * part.lora_B.weight @ part.lora_A.weight
    torch.testing.assert_close(base.blocks[1].mlp[2].weight, expected)


def test_targets_are_linear_maps_of_a_block():
    names = {n for n, _ in model_of(lora_rank=2, lora_targets=["attn_qkv"]).named_parameters() if "lora" in n}
    assert names == {f"blocks.{b}.attn_qkv.lora_{part}.weight" for b in (0, 1) for part in "AB"}
    with pytest.raises(UserError, match="lora_targets=qkv is not possible; it must be one of attn_out, attn_qkv, mlp"):
        model_of(lora_rank=2, lora_targets=["qkv"])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_frozen_head_makes_no_gradient(rank):
    model = model_of(self_conditioned=True, lora_rank=rank).train()
    freeze(model, run_config(model, last_layers=None if rank else 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    x = torch.randint(0, MASK, (4, 8), generator=torch.Generator().manual_seed(0))
    z = x.masked_fill(torch.arange(8) % 2 == 0, MASK)
    total, _ = model.weighted_nll(State(z, torch.ones(4).double(), torch.ones(4, 8, 16)), x, torch.ones(4, 8))
    total.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    last = {name for name in dict(model.named_parameters()) if name.startswith("blocks.1.")}
    added = {name for name, _ in model.named_parameters() if is_added(name)}
    assert with_gradient == (added if rank else added | last)
    whole = model_of(self_conditioned=True, lora_rank=rank).train()
    load_weights(whole, dict(model.named_parameters()), "frozen")
    whole.weighted_nll(State(z, torch.ones(4).double(), torch.ones(4, 8, 16)), x, torch.ones(4, 8))[0].backward()
    for name in with_gradient:
        torch.testing.assert_close(model.get_parameter(name).grad, whole.get_parameter(name).grad)


def test_nothing_to_train_is_refused():
    model = model_of()
    with pytest.raises(UserError, match=r"there is none; set self_conditioning\.rate above 0"):
        freeze(model, run_config(model, last_layers=0))


@pytest.fixture(scope="module")
def adapt(tmp_path_factory, base, molecules, empty_yaml):
    place = tmp_path_factory.mktemp("parts")

    def run(name, *keys, steps=4):
        arguments = [f"run_dir={place / name}", f"base={base}", f"data.path={molecules}", *ADAPTED]
        fixed = ["self_conditioning.rate=1", "precision=float32", f"train.steps={steps}", "train.checkpoint_every=2"]
        assert main(["adapt", str(empty_yaml), *arguments, *fixed, *keys]) == 0
        return place / name

    return run


@pytest.fixture(scope="module")
def adapted(adapt):
    return adapt("lora", *LORA)


def changed(run, base):
    before, after = weights_of(find_model(base)), weights_of(find_model(run), weights="raw")
    return {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}


@pytest.mark.parametrize("layers", [0, 1])
def test_only_the_last_layers_and_the_conditioner_change(adapt, base, layers):
    run = adapt(f"last{layers}", f"train.last_layers={layers}", "optimizer.lr=0.01")
    names = {name.partition(".")[0] for name in changed(run, base)}
    assert names == ({"conditioner", "blocks"} if layers else {"conditioner"})
    assert not any(name.startswith("blocks.0.") for name in changed(run, base))


def test_a_checkpoint_is_whole_and_keeps_moments_and_averages_of_what_is_trained(adapted, base):
    assert all(is_added(name) for name in changed(adapted, base))
    found = {}
    for key in tensor_shapes(find_model(adapted) / "tensors"):
        kind, _, name = key.partition(".")
        found.setdefault(kind, set()).add(name)
    assert found["weights"] >= set(weights_of(find_model(base)))
    added = {name for name in found["weights"] if is_added(name)}
    assert found["ema"] == found["exp_avg"] == found["exp_avg_sq"] == added


def test_it_goes_on_as_if_it_had_not_been_interrupted(adapt, adapted):
    adapt("stopped", *LORA, steps=2)
    run = adapt("stopped", *LORA, steps=4)
    for kind in ("raw", "ema"):
        ours, theirs = (weights_of(find_model(path), weights=kind) for path in (run, adapted))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def hidden(model):
    z = torch.randint(0, model.mask_id, (4, 16), generator=torch.Generator().manual_seed(0))
    estimate = torch.randn(4, 16, model.config.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.hidden(State(z, torch.ones(4).double(), estimate))


def test_an_export_is_merged_and_peft_reads_the_adapter(adapted, base, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    unmerged = read_model(find_model(adapted)).model
    assert main(["export", str(adapted), str(tmp_path / "export")]) == 0
    assert main(["export", str(adapted), str(tmp_path / "adapter"), "format=peft"]) == 0
    loaded = read_model(tmp_path / "export")
    assert loaded.spec.model.lora_rank == 0 and not any("lora" in name for name, _ in loaded.model.named_parameters())
    torch.testing.assert_close(hidden(loaded.model), hidden(unmerged), rtol=1e-4, atol=1e-5)
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    plain = DiT(loaded.spec.model, vocab_size=loaded.spec.vocab_size, mask_id=loaded.spec.mask_id, schedule=LogLinear())
    init_weights(plain, 0)
    load_weights(plain, weights_of(find_model(base)), "base", new_conditioner=True)
    assert not torch.allclose(hidden(plain), hidden(unmerged), atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(hidden(theirs.base_model.model), hidden(unmerged), rtol=1e-5, atol=1e-6)
    assert main(["export", str(base), str(tmp_path / "none"), "format=peft"]) == 1
    assert "has no adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.last_layers=3"], "train.last_layers=3 is not possible"),
        (["train.last_layers=1", "model.lora_rank=2"], "train.last_layers=1 is not possible"),
        (["model.lora_rank=2", "engine=deepspeed"], "use engine=fsdp2"),
        (["model.lora_rank=2", "model.lora_targets=[qkv]"], "model.lora_targets=qkv is not possible"),
        (["ema.reset=false", "ema.decay=0"], "ema.reset=false is not possible"),
    ],
)
def test_what_cannot_be_trained_is_refused(base, molecules, empty_yaml, tmp_path, capsys, keys, message):
    arguments = [f"run_dir={tmp_path / 'run'}", f"base={base}", f"data.path={molecules}", "train.steps=2", *ADAPTED]
    assert main(["adapt", str(empty_yaml), *arguments, "self_conditioning.rate=1", *keys]) == 1
    assert message in capsys.readouterr().err


def test_unmerged_adapters_are_no_base(adapted, molecules, empty_yaml, tmp_path, capsys):
    arguments = [f"run_dir={tmp_path / 'run'}", f"base={adapted}", f"data.path={molecules}", "train.steps=2", *ADAPTED]
    assert main(["adapt", str(empty_yaml), *arguments, "self_conditioning.rate=1"]) == 1
    assert "`scmdm export RUN OUT`" in capsys.readouterr().err


def test_a_carried_average_goes_on_where_its_base_was(adapt):
    updates = {}
    for reset in ("true", "false"):
        run = adapt(f"reset-{reset}", f"ema.reset={reset}", "ema.decay=0.5")
        updates[reset] = json.loads((find_model(run) / "state.json").read_text())["ema_updates"]
    assert updates == {"true": 4 + 1, "false": 6 + 4 + 1}, "the base made six steps"
