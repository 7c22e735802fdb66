"""Responses to held-out prompts: what is given, what is measured, and the whole way by the command line."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.sampling import SamplerConfig
from scmdm.data.loader import read_columns
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import load_tokenizer
from scmdm.domains.domain_registry import domain_of, load_domain
from scmdm.domains.interface import EvaluationSettings, GeneratedSamples
from scmdm.domains.responses.domain import ResponsesDomain, extract_responses
from scmdm.domains.text.config import TextMetricKeys
from scmdm.evaluation.evaluate import sample_templates
from scmdm.sampling.generation import generate
from scmdm.sampling.model_loading import load
from scmdm.sampling.templates import make_model_template
from scmdm.study.study_plan import Measurement
from scmdm.study.study_rows import compute_measurement

FRACTIONS = ["validation_fraction=0.2", "test_fraction=0.3"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Questions and answers, one of them empty behind the prompt's last blank."""
    folder = tmp_path_factory.mktemp("dialogue")
    rows = [{"q": f"say {i % 17} twice? ", "a": f"{i % 17} {i % 17} it is"} for i in range(90)]
    (folder / "dialogue.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.yaml").write_text("{}")
    keys = [
        "source.name=text",
        f"source.path={folder / 'dialogue.jsonl'}",
        "source.prompt_key=q",
        "source.response_key=a",
        "tokenizer.name=bytes",
    ]
    more = ["length=48", "pad_policy=loss", "deduplicate=false", *FRACTIONS, f"out={folder / 'data'}", "workers=1"]
    assert main(["prepare", str(folder / "empty.yaml"), *keys, *more]) == 0
    return folder


def test_templates_are_the_prompts_alone(dataset):
    root = dataset / "data"
    manifest, tokenizer = Manifest.read(root), load_tokenizer(root / "tokenizer.json")
    assert load_domain(domain_of(manifest)) is ResponsesDomain
    templates = ResponsesDomain.templates(root, manifest, "test", 5)
    columns = read_columns(root, "test", range(5))
    for template, row, given in zip(templates, columns["tokens"], columns["given"], strict=True):
        assert tokenizer.decode(template[:given].tolist()).endswith("twice? ")
        assert template[:given].tolist() == row[:given].tolist()
        assert set(template[given:].tolist()) == {tokenizer.mask_id}
    assert len(ResponsesDomain.templates(root, manifest, "test", 9999)) == manifest.splits["test"].samples


def test_held_out_responses_measure_as_themselves(dataset):
    root = dataset / "data"
    manifest, tokenizer = Manifest.read(root), load_tokenizer(root / "tokenizer.json")
    columns = read_columns(root, "test", range(8))
    texts, ids = extract_responses(columns["tokens"], columns["given"], tokenizer)
    assert all(text.endswith(" it is") and "say" not in text for text in texts)
    assert [tokenizer.decode(row[row != tokenizer.pad_id].tolist()) for row in ids] == texts
    drawn = GeneratedSamples(torch.from_numpy(columns["tokens"]), ["whole"] * 8, [True] * 8, [4] * 8, 1.0)
    domain = ResponsesDomain(root, manifest, TextMetricKeys(), EvaluationSettings())
    found = domain.measure(drawn).metrics
    for name in ("perplexity", "entropy", "distinct_1", "distinct_2", "distinct_3"):
        assert found[name] == found[f"{name}_held_out"] and math.isfinite(found[name])
    assert found["framed"] == 1 and found["empty"] == 0 and "training responses" in found["scorer"]
    ends = columns["tokens"].copy()
    for row, given in zip(ends, columns["given"], strict=True):
        row[given:] = tokenizer.eos_id
    silent = domain.measure(GeneratedSamples(torch.from_numpy(ends), [""] * 8, [True] * 8, [4] * 8, 1.0)).metrics
    assert silent["perplexity"] is None and silent["entropy"] == 0 and silent["empty"] == 8
    assert "NaN" not in json.dumps(silent)


def test_an_open_end_and_padding_inside_are_no_text(dataset):
    tokenizer = load_tokenizer(dataset / "data/tokenizer.json")
    letters = tokenizer.encode("abcdef")
    rows = np.array([[tokenizer.bos_id, *letters[:5]], [tokenizer.bos_id, letters[0], tokenizer.eos_id, *letters[1:4]]])
    texts, ids = extract_responses(rows, np.array([2, 1]), tokenizer)
    assert texts == ["bcde", "a"]
    assert ids[1].tolist() == [letters[0], *[tokenizer.pad_id] * 5]


def test_a_study_draws_responses_as_an_evaluation_does(dataset, tmp_path):
    """After training with padding to the batch, samples are as long as the longest held-out response."""
    run, root, empty = tmp_path / "run", dataset / "data", str(dataset / "empty.yaml")
    model = ["model.width=16", "model.layers=1", "model.heads=2", "model.condition_width=8"]
    train = ["train.steps=1", "train.global_batch_size=16", "train.micro_batch_size=16"]
    padding = ["train.padding=batch", "train.pad_multiple=4"]
    assert main(["train", empty, f"data.path={root}", f"run_dir={run}", *model, *train, *padding]) == 0
    loaded, manifest = load(run), Manifest.read(root)
    settings = {"kind": "samples", "split": "test", "num": 6, "sampling_seed": 0, "metrics_config": {}}
    settings["sampler"] = asdict(SamplerConfig(steps=4))
    task = Measurement(loaded.path, settings, tmp_path / "row.json", tmp_path / "samples.jsonl")
    drawn = compute_measurement(loaded, task, root, "responses", EvaluateConfig())["drawn"]
    config = EvaluateConfig(num=6)
    templates, lengths = sample_templates(loaded, ResponsesDomain, root, manifest, config)
    expected = generate(loaded, SamplerConfig(steps=4), num=1, seed=0, templates_PL=templates, lengths_P=lengths)
    assert int(lengths.max()) < manifest.length and torch.equal(drawn.tokens, expected.tokens)
    assert drawn.computed_evaluations is None


def test_by_the_command_line(dataset, tmp_path, capsys):
    run, out, empty = tmp_path / "run", tmp_path / "found.json", str(dataset / "empty.yaml")
    model = ["model.width=16", "model.layers=1", "model.heads=2", "model.condition_width=8"]
    train = ["train.steps=2", "train.global_batch_size=16", "train.micro_batch_size=16"]
    assert main(["train", empty, f"data.path={dataset / 'data'}", f"run_dir={run}", *model, *train]) == 0
    capsys.readouterr()
    keys = ["num=6", "batch_size=4", "seeds=[0,1]", "nelbo_samples=8", "sampler.steps=4", f"out={out}"]
    assert main(["evaluate", str(run), *keys]) == 0
    assert "bigrams" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["domain"] == "responses" and len(result["samples"]) == 2
    assert result["samples"][0]["metrics"]["num_samples"] == 6
    assert main(["sample", str(run), "num=1", "sampler.steps=4"]) == 1
    assert "prompts=FILE" in capsys.readouterr().err
    assert main(["sample", str(run), "num=2", "sampler.steps=4", "prompt=say 3 twice? "]) == 0
    assert capsys.readouterr().out.startswith("say 3 twice? ")
    loaded = load(run)
    assert make_model_template(loaded, 48, "say").tolist()[1:4] == loaded.tokenizer.encode("say")
