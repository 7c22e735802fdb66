"""`scmdm plan` on the command line."""

import json
from pathlib import Path

import pytest

from scmdm.cli import main

MODELS = Path(__file__).parents[2] / "configs" / "model"
DATA = ["--length", "128", "--vocab", "1000"]


def plan(capsys, *arguments):
    """The configuration and its keys come first, as argparse wants it."""
    given = [str(argument) for argument in arguments]
    keys = [argument for argument in given[1:] if "=" in argument]
    status = main(["plan", given[0], *keys, *(argument for argument in given[1:] if argument not in keys)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_models_yaml_is_enough(capsys):
    status, out, _ = plan(capsys, MODELS / "small.yaml", "self_conditioning.rate=1", *DATA, "--nodes", 2)
    assert status == 0
    for words in ("adaptation (1 no-grad pass)", "2 x 8 h100", "best found", "tokens per day"):
        assert words in " ".join(out.split())
    assert "default model" not in out


def test_a_plan_for_the_default_model_says_so(capsys):
    recipe = MODELS.parent / "text/adapt.yaml"
    keys = ["train.micro_batch_size=8"]
    status, out, _ = plan(capsys, recipe, *keys, *DATA)
    assert status == 0 and "default model" in out
    for given, expected in (([], True), (["model.width=256"], False)):
        made = json.loads(plan(capsys, recipe, *keys, *given, *DATA, "--json")[1])
        assert made["workload"]["default_model"] is expected


def test_json_holds_every_figure_and_its_settings_can_be_given_back(capsys):
    arguments = [MODELS / "tiny.yaml", "self_conditioning.rate=1", *DATA, "--nodes", 1, "--json"]
    status, out, _ = plan(capsys, *arguments)
    content = json.loads(out)
    best = content["best"]
    assert status == 0 and best["fits"] and content["reason"] is None
    given = [f"{key}={str(value).lower()}" for key, value in best["settings"].items()]
    again = json.loads(plan(capsys, *arguments, *given)[1])
    assert again["configured"]["memory"]["peak"] == best["memory"]["peak"]
    assert again["configured"]["time"] == best["time"]


def test_deepspeed_and_one_gpu(capsys):
    for keys in (["engine=deepspeed", "deepspeed.stage=3"], ["--gpus-per-node", 1]):
        status, out, _ = plan(capsys, MODELS / "tiny.yaml", "train.micro_batch_size=1", *DATA, *keys, "--json")
        assert status == 0
        assert json.loads(out)["configured"]["settings"]["engine"] in ("deepspeed", "single")


def test_a_data_set_gives_length_and_vocabulary(capsys, base, molecules, empty_yaml):
    keys = [f"data.path={molecules}", "train.micro_batch_size=8", "--json"]
    status, out, _ = plan(capsys, empty_yaml, *keys)
    assert status == 0
    workload = json.loads(out)["workload"]
    assert (workload["length"], workload["no_grad_passes"]) == (24, 0)
    status, out, _ = plan(capsys, empty_yaml, *keys, f"base={base}", "self_conditioning.rate=1")
    adapted = json.loads(out)["workload"]
    assert status == 0 and adapted["vocab_size"] == workload["vocab_size"] and adapted["no_grad_passes"] == 1
    status, _, err = plan(capsys, empty_yaml, *keys, f"base={base}", "self_conditioning.rate=1", "--vocab", 5)
    assert status == 1 and "leave --vocab out" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--vocab", "1000"], "give --length"),
        (["--length", "128"], "give --vocab"),
        ([*DATA, "--gpu", "abacus"], "--gpu abacus"),
        ([*DATA, "--gpu", "a100", "model.matmul_precision=fp8"], "--gpu a100"),
        ([*DATA, "precision=float32", "model.matmul_precision=fp8"], "precision=float32"),
        ([*DATA, "train.global_batch_size=7", "train.micro_batch_size=7"], "choose a global batch"),
        ([*DATA, "modle.width=4"], "did you mean `model`"),
    ],
)
def test_mistakes_end_with_one_line(arguments, named, capsys):
    status, _, err = plan(capsys, MODELS / "tiny.yaml", *arguments)
    assert status == 1 and named in err and len(err.splitlines()) == 1


def test_a_model_that_fits_nowhere_ends_with_the_reason(capsys):
    keys = ["engine=single", "--gpus-per-node", 1, "train.micro_batch_size=1"]
    status, out, err = plan(capsys, MODELS / "8b.yaml", *keys, *DATA)
    assert status == 1
    assert "nothing fits" in err and "shard with engine=fsdp2" in err
    assert "NO" in out


@pytest.mark.parametrize(
    ("name", "vocab", "parameters"), [("llada-8b", 126_464, 8.016e9), ("dream-7b", 152_064, 7.616e9)]
)
def test_published_sizes_are_counted(capsys, name, vocab, parameters):
    """Without conditioner; Dream is as large as Qwen2.5 7B, 7.616e9 by its card."""
    arguments = [MODELS / f"{name}.yaml", "--length", 512, "--vocab", vocab, "--json"]
    status, out, _ = plan(capsys, *arguments)
    assert status == 0
    assert json.loads(out)["workload"]["parameters"] == pytest.approx(parameters, rel=1e-3)
