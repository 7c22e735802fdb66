"""Packed samples and prompts from the raw text to a training step: what the shards say, what is masked and counted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from scmdm.cli import main
from scmdm.data.loader import build_loader, epochs, read_columns, read_split
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture
from scmdm.data.tokenizers import load_tokenizer
from scmdm.data.verification import verify_dataset
from scmdm.training.validation import ValidationSet, to_device
from tests.conftest import TINY

CPU = torch.device("cpu")


def prepared(path, out, empty_yaml, *keys):
    options = [
        f"source.path={path}",
        f"out={out}",
        "source.name=text",
        "source.unit=documents",
        "tokenizer.name=bytes",
        "length=64",
    ]
    fractions = ["validation_fraction=0.2", "test_fraction=0.2", "workers=1"]
    assert main(["prepare", str(empty_yaml), *options, *fractions, *keys]) == 0
    assert not verify_dataset(out)
    return Manifest.read(out)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, empty_yaml):
    place = tmp_path_factory.mktemp("packed")
    lines = [json.dumps({"text": f"{number:03} " + "w" * (number % 37)}) for number in range(400)]
    (place / "a.jsonl").write_text("\n".join(lines))
    prepared(place / "a.jsonl", place / "data", empty_yaml, "framing=packed", "pad_policy=ignore")
    return place / "data"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, empty_yaml):
    place = tmp_path_factory.mktemp("prompted")
    rows = [{"ask": f"{number:03}?" + "q" * (number % 20), "answer": "a" * (number % 9 + 1)} for number in range(400)]
    rows += [{"ask": "q" * 60, "answer": "too long for a sample"}, {"ask": "no answer"}, {"ask": "1", "answer": " "}]
    (place / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = ("source.prompt_key=ask", "source.response_key=answer", "pad_policy=ignore")
    return place / "data", prepared(place / "a.jsonl", place / "data", empty_yaml, *keys)


def test_every_document_is_in_its_place(packed):
    manifest = Manifest.read(packed)
    assert manifest.framing == "packed"
    found = set()
    for split in manifest.splits:
        columns = read_columns(packed, split, range(manifest.splits[split].samples))
        for tokens_L, documents_L in zip(columns["tokens"], columns["documents"], strict=True):
            padding = tokens_L == manifest.pad_id
            for number in range(documents_L.max() + 1):
                ids = tokens_L[documents_L == number]
                if padding[documents_L == number].all():
                    continue
                assert ids[0] == manifest.bos_id and ids[-1] == manifest.eos_id
                found.add(load_tokenizer(packed / "tokenizer.json").decode(ids.tolist()))
    assert found == {f"{number:03} " + "w" * (number % 37) for number in range(400)}


@pytest.mark.parametrize("bos_policy", ["given", "loss"])
def test_valid_positions_of_packed_samples(packed, bos_policy):
    manifest = replace(Manifest.read(packed), bos_policy=bos_policy)
    samples = manifest.splits["train"].samples
    batch = next(ValidationSet.at(packed, "train", manifest, samples).batches(CPU, size=samples))
    tokens, valid, documents = batch.tokens, batch.valid, batch.documents
    beginnings = tokens == manifest.bos_id
    expected = (tokens != manifest.pad_id) & (~beginnings if bos_policy == "given" else torch.ones_like(beginnings))
    assert torch.equal(valid, expected) and documents.shape == tokens.shape
    if bos_policy == "given":
        assert int(valid.sum()) == manifest.splits["train"].tokens


def test_the_loader_delivers_the_numbers(packed):
    data = DataMixture.at(packed)
    loader = build_loader(data, "train", batch_size=8, shuffle=True, seed=0, drop_last=True)
    batch = next(epochs(loader, 8))
    stored = read_columns(packed, "train", sorted(batch["index"].tolist()))
    order = torch.argsort(batch["index"])
    assert np.array_equal(batch["documents"][order].numpy(), stored["documents"])
    assert torch.equal(to_device(batch, data.manifest, CPU).documents, batch["documents"])


def test_only_responses_are_masked_and_counted(prompted):
    root, manifest = prompted
    assert manifest.framing == "prompts"
    dropped = {key: value for key, value in manifest.counts.items() if key.startswith("dropped")}
    assert dropped == {"dropped: too long": 1, "dropped: no key answer": 1, "dropped: empty": 1}
    tokenizer, total = load_tokenizer(root / "tokenizer.json"), 0
    for split, info in manifest.splits.items():
        batch = next(ValidationSet.at(root, split, manifest, info.samples).batches(CPU, size=info.samples))
        tokens, valid = batch.tokens, batch.valid
        assert int(valid.sum()) == info.tokens
        for row, counted in zip(tokens, valid, strict=True):
            text = tokenizer.decode(row.tolist())
            prompt = text[: 4 + int(text[:3]) % 20]
            assert tokenizer.decode(row[counted].tolist()) == text[len(prompt) :] == "a" * (int(text[:3]) % 9 + 1)
            assert int(counted.sum()) == len(text) - len(prompt) + 1, "the end mark counts"
            total += 1
    assert total == 400


@pytest.mark.parametrize("kind", ["packed", "prompted"])
def test_it_trains(kind, request, tmp_path, empty_yaml):
    fixture = request.getfixturevalue(kind)
    root = fixture if kind == "packed" else fixture[0]
    keys = [f"run_dir={tmp_path / 'run'}", f"data.path={root}", "train.steps=2", "self_conditioning.rate=1.0"]
    keys += [key.replace("=64", "=8").replace("=32", "=4") if "batch_size" in key else key for key in TINY]
    keys[keys.index("train.validate_every=0")] = "train.validate_every=2"
    assert main(["train", str(empty_yaml), *keys]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_whole_splits_are_read_as_before(packed):
    assert read_split(packed, "test").shape == (Manifest.read(packed).splits["test"].samples, 64)
    assert read_split(packed, "test", []).shape == (0, 64)


def test_prompts_are_not_cut_or_packed(tmp_path, empty_yaml, capsys):
    options = [
        "source.name=text",
        f"source.path={tmp_path}",
        f"out={tmp_path / 'a'}",
        "tokenizer.name=bytes",
        "length=64",
    ]
    for keys, message in (
        (["source.prompt_key=a"], "source.prompt_key='a' is not possible"),
        (
            ["source.prompt_key=a", "source.response_key=b", "framing=concatenate"],
            "framing='concatenate' is not possible",
        ),
    ):
        assert main(["prepare", str(empty_yaml), *options, *keys]) == 1
        assert message in capsys.readouterr().err
