"""AutoModel: what it computes is what the run computes, and it writes what it reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import scmdm
import scmdm.integrations.transformers
from scmdm.cli import main
from scmdm.config.sampling import SamplerConfig
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.sampling.generation import generate
from tests.conftest import ADAPTED


@pytest.fixture(scope="module")
def adapted(base, molecules, empty_yaml, tmp_path_factory):
    run = tmp_path_factory.mktemp("hub") / "run"
    keys = [f"run_dir={run}", f"base={base}", f"data.path={molecules}", "train.steps=3", "optimizer.lr=0.02"]
    assert main(["adapt", str(empty_yaml), *ADAPTED, *keys, "self_conditioning.rate=1"]) == 0
    return run


@pytest.fixture(scope="module")
def exported(adapted, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "exported"
    assert main(["export", str(adapted), str(out), "format=hub", "shard_gb=1e-4"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    return out


def test_predictions_with_and_without_an_estimate(adapted, exported):
    theirs, ours = AutoModel.from_pretrained(exported).eval(), scmdm.load(adapted)
    z = torch.randint(0, ours.spec.vocab_size, (3, ours.spec.length), generator=torch.Generator().manual_seed(0))
    z[:, ::2] = ours.spec.mask_id
    t = torch.ones(3).double()
    with torch.no_grad():
        first = theirs(z)
        second = theirs(z, estimate=first.estimate)
        estimate = ours.model.estimate(State(z, t))
        hidden = ours.model.hidden(State(z, t, estimate))
    torch.testing.assert_close(first.estimate, estimate)
    torch.testing.assert_close(second.logits, ours.model.logits(hidden.flatten(0, 1)).unflatten(0, z.shape))
    assert not torch.allclose(first.logits[..., :3], second.logits[..., :3])


def test_samples_are_those_of_the_command(adapted, exported):
    ours = scmdm.load(adapted)
    drawn = generate(ours, SamplerConfig(steps=6), num=5, seed=3)
    given = torch.full((5, ours.spec.length), ours.spec.mask_id)
    given[:, 0] = ours.manifest.bos_id
    settings = SamplerSettings(kind="ancestral", steps=6, carry=True)
    assert torch.equal(AutoModel.from_pretrained(exported).denoise(given, settings, seed=3), drawn.tokens)


def test_what_it_saves_it_reads(adapted, exported, tmp_path):
    first = AutoModel.from_pretrained(exported)
    first.save_pretrained(tmp_path / "again")
    scmdm.integrations.transformers.MaskedDiffusion.of(scmdm.load(adapted)).save_pretrained(tmp_path / "direct")
    for place in ("again", "direct"):
        other = AutoModel.from_pretrained(tmp_path / place)
        assert other.spec == first.spec
        for (name, a), (same, b) in zip(first.state_dict().items(), other.state_dict().items(), strict=True):
            assert name == same and torch.equal(a, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: None,
        lambda value: value.to(torch.int8),
        lambda value: value * float("nan"),
        lambda value: value[:-1],
    ],
)
def test_weights_that_transformers_would_make_up(adapted, tmp_path, make):
    out, name = tmp_path / "out", "network.blocks.1.attn_out.weight"
    assert main(["export", str(adapted), str(out), "format=hub"]) == 0
    weights = load_file(out / "model.safetensors")
    made = make(weights.pop(name))
    save_file({**weights, **({} if made is None else {name: made})}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"blocks\.1\.attn_out\.weight"):
        AutoModel.from_pretrained(out)


@pytest.mark.parametrize(
    "change", [{"layers": 10**9}, {"layers": 1000}, {"width": 65536}, {"surprise": 1}, {"kind": 3}, {"heads": "2"}]
)
def test_a_configuration_of_another_model(exported, tmp_path, change):
    out = shutil.copytree(exported, tmp_path / "out")
    content = json.loads((out / "config.json").read_text())
    content["spec"]["model"] |= change
    (out / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=str(out)):
        AutoModel.from_pretrained(out)
