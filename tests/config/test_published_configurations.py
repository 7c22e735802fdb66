"""Configurations that follow a paper: every published value, key by key, and a plan for each."""

import json
from pathlib import Path

import pytest

from scmdm.cli import main
from scmdm.config.loading import load_config
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.models.model_files import ModelSpec

ROOT = Path(__file__).parents[2]

MDLM = {  # arXiv 2406.07524 and its code; the published codes of the other data sets are built on it
    "model.kind": "dit",
    "model.width": 768,
    "model.layers": 12,
    "model.heads": 12,
    "model.condition_width": 128,
    "model.mlp_ratio": 4,
    "model.dropout": 0.1,
    "model.time_conditioning": False,
    "precision": "bfloat16",
    "diffusion.schedule": "log_linear",
    "diffusion.eps": 1e-3,
    "diffusion.t_min": 1e-3,
    "self_conditioning.rate": 0.0,
    "optimizer.lr": 3e-4,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip": 1.0,
    "schedule.kind": "constant",
    "schedule.warmup_steps": 2500,
    "schedule.initial_ratio": 0.0,
    "ema.decay": 0.9999,
    "ema.warmup": True,
    "train.steps": 1_000_000,
    "train.global_batch_size": 512,
    "model.labels": False,
}
RUNS = {
    "text/owt-base": (MDLM, 1024, 50258),
    "text/lm1b-base": (MDLM, 128, 30522),
    "text/text8-base": (MDLM, 256, 31),
    "qm9/full-base": (
        MDLM
        | {
            "schedule.kind": "cosine",
            "schedule.warmup_steps": 1000,
            "schedule.final_ratio": 3e-6 / 3e-4,
            "schedule.initial_ratio": 3.3333e-3,  # 1e-6 / 3e-4
            "train.steps": 25_000,
            "train.global_batch_size": 2048,
        },
        32,
        34,
    ),
    "species10/base": (
        MDLM
        | {
            "model.width": 256,
            "model.layers": 8,
            "model.heads": 4,  # of this project's transformer; the published network is a Mamba without heads
            "model.labels": True,
            "train.label_dropout": 0.1,
            "optimizer.lr": 2e-3,
            "schedule.kind": "cosine",
            "schedule.warmup_steps": 3000,
            "schedule.final_ratio": 2e-6 / 2e-3,
            "schedule.initial_ratio": 1e-6 / 2e-3,
            "train.steps": 30_000,
            "train.global_batch_size": 32,
        },
        32768,
        9,
    ),
    "images/cifar10": (
        MDLM
        | {
            "model.labels": True,
            "train.label_dropout": 0.1,
            "optimizer.lr": 2e-4,
            "schedule.warmup_steps": 5000,
            "train.steps": 300_000,
            "data.validation_split": "test",
        },
        3073,
        260,
    ),
}
BLOCKS = {"length": 1024, "framing": "concatenate", "bos_policy": "loss", "pad_policy": "loss", "deduplicate": False}
PREPARED = {
    "owt": BLOCKS | {"held_out_last": 100_000, "source.unit": "documents", "tokenizer.name": "huggingface"},
    "lm1b": {
        "length": 128,
        "framing": "records",
        "source.detokenize": "lm1b",
        "long_records": "truncate",
        "deduplicate": False,
        "pad_policy": "masked",
    },
    "wikitext": BLOCKS | {"source.detokenize": "wikitext", "source.split_by": "names"},
    "text8": {"length": 256, "source.name": "text8", "tokenizer.name": "characters", "deduplicate": False},
    "qm9_published": {
        "length": 32,
        "tokenizer.name": "smiles",
        "source.column": "canonical_smiles",
        "pad_policy": "loss",
        "bos_policy": "loss",
        "validation_fraction": 0.05,
        "split_seed": 42,
        "deduplicate": False,
    },
    "species10_published": {
        "length": 32768,
        "source.species_from": "folder",
        "source.stride": None,
        "source.reverse_complement": False,
        "pad_policy": "ignore",
        "validation_fraction": 0.05,
        "split_seed": 42,
        "deduplicate": False,
    },
    "cifar10_published": {
        "length": 3073,
        "source.levels": None,  # all 256
        "source.flips": True,
        "validation_fraction": 0.0,
        "deduplicate": False,
    },
}
DATA_OF = {
    "text/owt-base": "owt",
    "text/lm1b-base": "lm1b",
    "text/text8-base": "text8",
    "qm9/full-base": "qm9_published",
    "species10/base": "species10_published",
    "images/cifar10": "cifar10_published",
}

NUMBERS = ("text/lm1b-base", "text/text8-base", "qm9/full-base")  # differ from text/owt-base in numbers only


def values_of(config, names):
    found = {}
    for name in names:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


@pytest.mark.parametrize("name", RUNS)
def test_runs(name):
    published, _, _ = RUNS[name]
    config = load_config(RunConfig, ROOT / f"configs/{name}.yaml")
    config.validate()
    assert values_of(config, published) == pytest.approx(published)


@pytest.mark.parametrize("name", PREPARED)
def test_data_sets(name):
    published = PREPARED[name]
    config = load_config(PrepareConfig, ROOT / f"configs/data/{name}.yaml")
    config.validate()
    assert values_of(config, published) == published


@pytest.mark.parametrize("name", RUNS)
def test_a_run_names_its_data_set(name):
    run = load_config(RunConfig, ROOT / f"configs/{name}.yaml")
    prepared = load_config(PrepareConfig, ROOT / f"configs/data/{DATA_OF[name]}.yaml")
    assert run.data.path == prepared.out and prepared.length == RUNS[name][1]


@pytest.mark.parametrize("adapt", ["text/owt-adapt", "text/lm1b-adapt", "qm9/full-adapt", "species10/adapt"])
def test_adaptations_use_the_data_and_the_times_of_their_base(adapt):
    base = {"text/owt-adapt": "text/owt-base", "text/lm1b-adapt": "text/lm1b-base"}.get(adapt)
    base = base or adapt.replace("full-adapt", "full-base").replace("/adapt", "/base")
    own, of_base = (load_config(RunConfig, ROOT / f"configs/{name}.yaml") for name in (adapt, base))
    same = ("data.path", "precision", "diffusion.t_min", "train.global_batch_size")
    assert values_of(own, same) == values_of(of_base, same)


@pytest.mark.parametrize("name", RUNS)
def test_networks(name):
    """The network of each, without memory for its weights."""
    _, length, vocab = RUNS[name]
    config = load_config(RunConfig, ROOT / f"configs/{name}.yaml")
    spec = ModelSpec(config.model, config.diffusion, vocab, vocab - 1, length, classes=10)
    blocks = sum(weight.numel() for part, weight in spec.build().named_parameters() if "blocks" in part)
    assert blocks > 12 * config.model.layers * config.model.width**2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in NUMBERS else ()) for name in RUNS]
)
def test_plans(name, capsys):
    """The arithmetic of a plan takes the configuration, without its data."""
    _, length, vocab = RUNS[name]
    config = str(ROOT / f"configs/{name}.yaml")
    options = ["--length", str(length), "--vocab", str(vocab), "--nodes", "1", "--json"]
    assert main(["plan", config, "train.micro_batch_size=1", *options]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["workload"]["length"] == length and planned["workload"]["vocab_size"] == vocab
