"""Import and export of MDLM's checkpoints: outputs and tensors are equal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import scmdm
from scmdm.cli import main
from scmdm.data.tokenizers import load_tokenizer
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.state import State
from scmdm.models.model_files import read_spec
from tests.conftest import ADAPTED
from tests.convert.published import (
    CONDITION,
    LENGTH,
    MASK,
    VOCAB,
    WORDS,
    mdlm_weights,
    published_update,
    write_lightning,
    write_mdlm,
    write_texts,
)
from tests.weights import weights_of


def tensors(directory):
    return weights_of(directory)


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_vanilla_sampler_draws_what_the_published_formula_draws(tmp_path, conditioned):
    """Fixed noise: in each step the distribution is the formula's within 1e-5, and so is every token of 64 samples."""
    source = write_mdlm(tmp_path / "mdlm", time_conditioning=conditioned)
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    loaded = scmdm.load(tmp_path / "ours")
    steps, seed, ids = 8, 5, torch.arange(64)
    given = torch.full((64, LENGTH), MASK)
    states = [given]
    settings = SamplerSettings(kind="ancestral", steps=steps, carry=False)
    sample(
        loaded.model,
        given,
        ids,
        schedule=loaded.spec.schedule,
        settings=settings,
        mask_id=loaded.spec.mask_id,
        seed=seed,
        on_step=lambda seen: states.append(seen.z_BL),
    )
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for index in range(steps - 1):  # the last step leaves no mask, whatever the noise
        x, t, s = states[index], float(grid[index]), float(grid[index + 1])
        q = published_update(mdlm_weights(), x, t, s, conditioned)
        masked = x == MASK
        logits = loaded.model.logits(loaded.model.hidden(State(x, grid[index].expand(64)))[masked])
        alpha = loaded.spec.schedule.alpha(grid[index : index + 2])
        reveal = float((alpha[1] - alpha[0]) / (1 - alpha[0]))
        ours = logits.softmax(-1) * reveal
        ours[:, MASK] += 1 - reveal
        torch.testing.assert_close(ours, q[masked].float(), rtol=0, atol=1e-5)
        revealed = masked & (keyed_uniform(seed, "reveal", index, ids, LENGTH) < 1 - q[:, :, MASK])
        rows, columns = revealed.nonzero(as_tuple=True)
        noise = keyed_uniform(seed, "token", index, ids[rows] * LENGTH + columns, VOCAB)
        drawn = (q[revealed].double().log() - (-noise.log()).log())[:, :MASK].argmax(-1)
        assert torch.equal(states[index + 1], x.masked_scatter(revealed, drawn))


def test_import_export_import_is_bitwise_the_same(tmp_path):
    source = write_mdlm(tmp_path / "mdlm")
    assert main(["import", str(source), str(tmp_path / "first")]) == 0
    assert main(["export", str(tmp_path / "first"), str(tmp_path / "out"), "format=mdlm"]) == 0
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "second")]) == 0
    published = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_tensors(published, mdlm_weights())
    first, second = tmp_path / "first", tmp_path / "second"
    assert_same_tensors(tensors(first), tensors(second))
    for name in ("model.json", "manifest.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    # Without what lies beside it, the published layout says the same again.
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    assert {key: described[key] for key in before} == before
    (tmp_path / "out" / "scmdm").rename(tmp_path / "aside")
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "third")]) == 0
    assert_same_tensors(tensors(first), tensors(tmp_path / "third"))
    assert read_spec(first) == read_spec(tmp_path / "third")


def test_the_architecture_is_read_off_the_tensors(tmp_path, capsys):
    """One safetensors file alone: heads follow from the rotary table."""
    source = write_mdlm(tmp_path / "mdlm")
    (source / "config.json").unlink()
    command = ["import", str(source / "model.safetensors"), str(tmp_path / "out")]
    for given in ([], [f"length={LENGTH}"], ["time_conditioning=false"]):
        assert main([*command, *given]) == 1
    assert "length=" in capsys.readouterr().err
    assert main([*command, f"length={LENGTH}", "time_conditioning=false"]) == 0
    spec = read_spec(tmp_path / "out")
    assert (spec.model.heads, spec.model.condition_width, spec.vocab_size, spec.mask_id) == (4, CONDITION, VOCAB, MASK)
    assert spec.diffusion.eps == 1e-3


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_lightning_checkpoint_is_read_with_its_averages(tmp_path, weights):
    checkpoint = write_lightning(tmp_path / "last.ckpt")
    assert main(["import", str(checkpoint), str(tmp_path / "out"), f"weights={weights}"]) == 0
    expected = mdlm_weights(seed=1 if weights == "ema" else 0)
    found = tensors(tmp_path / "out")
    assert len(found) == len(expected) - 1
    for name, value in found.items():
        assert torch.equal(value, expected[f"backbone.{name}"]), name
    spec = read_spec(tmp_path / "out")
    assert spec.length == LENGTH and spec.model.time_conditioning and spec.model.dropout == 0.1


def test_a_model_without_a_mask_gets_one(tmp_path, capsys):
    """Uniform-state models (UDLM, Duo): the embedding has a row per token, and no more."""
    source = write_mdlm(tmp_path / "duo", mdlm_weights(rows=len(WORDS)), time_conditioning=True)
    assert main(["import", str(source), str(tmp_path / "out")]) == 0
    assert f"a mask token was added as id {len(WORDS)}" in capsys.readouterr().out
    found, before = tensors(tmp_path / "out"), mdlm_weights(rows=len(WORDS))
    for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        assert torch.equal(found[name][:-1], before[f"backbone.{name}"])
    mean = before["backbone.vocab_embed.embedding"].mean(0)
    torch.testing.assert_close(found["vocab_embed.embedding"][-1], mean)
    assert main(["sample", str(tmp_path / "out"), "num=2", "sampler.steps=4", "device=cpu"]) == 0


def test_an_adapted_model_is_restored_from_its_export(tmp_path, empty_yaml):
    """Published base -> data prepared with its tokenizer -> adaptation -> published layout -> the adapted model."""
    source, base = write_mdlm(tmp_path / "mdlm"), tmp_path / "base"
    assert main(["import", str(source), str(base)]) == 0
    text = write_texts(tmp_path / "text.jsonl")
    keys = [
        "source.name=text",
        f"source.path={text}",
        "tokenizer.name=huggingface",
        "framing=concatenate",
        "validation_fraction=0.1",
        "test_fraction=0.1",
        f"length={LENGTH}",
    ]
    keys += [f"tokenizer.path={base}/tokenizer.json", f"out={tmp_path / 'data'}"]
    assert main(["prepare", str(empty_yaml), *keys]) == 0
    run = [f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}", "self_conditioning.rate=1"]
    small = ["train.steps=3", "train.global_batch_size=8", "train.micro_batch_size=8"]
    assert main(["adapt", str(empty_yaml), f"base={base}", *run, *ADAPTED, *small]) == 0
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "format=mdlm"]) == 0
    assert not any("conditioner" in name for name in load_file(out / "model.safetensors"))
    card = (out / "README.md").read_text()
    assert "self-conditioned" in card and "scmdm import" in card and "rate: 1.0" in card
    assert "base: base\n" in card and str(tmp_path) not in card  # a path of this machine helps nobody
    assert main(["import", str(out), str(tmp_path / "again")]) == 0
    ours, again = scmdm.load(tmp_path / "run"), scmdm.load(tmp_path / "again")
    assert ours.spec == again.spec and again.spec.model.self_conditioned and again.spec.step == 3
    assert_same_tensors(dict(ours.model.named_parameters()), dict(again.model.named_parameters()))
    assert (
        main(
            [
                "adapt",
                str(empty_yaml),
                f"base={tmp_path / 'again'}",
                *run,
                *ADAPTED,
                *small,
                f"run_dir={tmp_path / 'next'}",
            ]
        )
        == 0
    )


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tmp_path, capsys):
    source = write_mdlm(tmp_path / "there", vocab_size=VOCAB + 1)
    assert main(["import", str(source), str(tmp_path / "out")]) == 1
    assert f"vocab_size={VOCAB + 1}" in capsys.readouterr().err


def test_a_tokenizer_keeps_the_rows_that_no_token_has(tmp_path):
    weights = mdlm_weights(rows=VOCAB + 5)
    source = write_mdlm(tmp_path / "padded", weights)
    assert main(["import", str(source), str(tmp_path / "out"), f"mask_id={VOCAB + 2}"]) == 0
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (VOCAB + 5, VOCAB + 2)
    assert tokenizer.decode([1, VOCAB + 4, 2]) == "ab"
    assert_same_tensors(
        tensors(tmp_path / "out"), {n.removeprefix("backbone."): v for n, v in weights.items() if "inv_freq" not in n}
    )


def test_export_in_another_precision(tmp_path):
    assert main(["import", str(write_mdlm(tmp_path / "mdlm")), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "half"), "dtype=bfloat16", "shard_gb=1e-5"]) == 0
    half, whole = tensors(tmp_path / "half"), tensors(tmp_path / "ours")
    assert len(list((tmp_path / "half").glob("weights-*-of-*.safetensors"))) > 3
    assert_same_tensors(half, {name: value.bfloat16() for name, value in whole.items()})
    loaded = scmdm.load(tmp_path / "half")
    assert all(p.dtype == torch.float32 and torch.equal(p, half[n].float()) for n, p in loaded.model.named_parameters())
    assert main(["checkpoint", "verify", str(tmp_path / "half")]) == 0


def test_a_published_layout_is_not_yet_a_model(tmp_path, capsys):
    there = write_mdlm(tmp_path / "mdlm")
    assert main(["sample", str(there)]) == 1
    assert f"scmdm import {there}" in capsys.readouterr().err


def test_mdlm_has_no_place_for_a_llama(tmp_path, capsys):
    assert main(["import", str(write_mdlm(tmp_path / "mdlm")), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "format=llada"]) == 1
    assert "format=llada is not possible for model.kind=dit; give format=mdlm" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert main(["import", str(tmp_path / "x.safetensors"), str(tmp_path / "out")]) == 1
    assert "in no layout that scmdm reads" in capsys.readouterr().err
