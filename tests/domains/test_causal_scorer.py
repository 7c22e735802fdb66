"""Scorers are folders of strangers: each is refused by name before anything is sampled, and nothing in it runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scmdm.domains.text.causal_scorer import check_scorer, load_scorer
from scmdm.errors import UserError
from tests.domains.test_text import scorer  # noqa: F401 (a fixture)

WEIGHT = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture
def folder(scorer, tmp_path):  # noqa: F811
    return shutil.copytree(scorer, tmp_path / "scorer")


def change(folder, file="config.json", **keys):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change_weight(folder, make):
    weights = load_file(folder / "model.safetensors")
    made = make(weights.pop(WEIGHT))
    save_file({**weights, **({} if made is None else {WEIGHT: made})}, folder / "model.safetensors", {"format": "pt"})


def refused(folder):
    with pytest.raises(UserError) as error:
        load_scorer(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_a_model_that_sees_later_tokens(folder, kind):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    made = AutoConfig.for_model(kind, vocab_size=40, **(small if kind != "t5" else {"d_model": 16, "num_layers": 1}))
    make = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    make.from_config(made).save_pretrained(folder)
    assert f"model_type={kind}" in refused(folder)


def test_causality_is_tried_not_believed(folder):
    """A decoder by its configuration, whose masks are replaced by ones that hide nothing."""
    from transformers import GPT2LMHeadModel

    from scmdm.domains.text import causal_scorer

    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    causal_scorer._check_causal(folder, model)
    for block in model.transformer.h:
        block.attn.bias.fill_(True)
    with pytest.raises(UserError, match="scorer"):
        causal_scorer._check_causal(folder, SeesAll(model))


class SeesAll:
    """Passes a full mask, which `transformers` takes as it is."""

    def __init__(self, model):
        self._model, self.config = model, model.config
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, input_ids, attention_mask):
        full = torch.zeros(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1])
        return self._model(input_ids=input_ids, attention_mask=full)


def test_an_embedding_smaller_than_the_tokenizer(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["beyond"] = 1000
    path.write_text(json.dumps(content))
    assert "1000" in refused(folder)


def test_no_tokenizer(folder):
    for path in (*folder.glob("tokenizer*"), *folder.glob("special*")):
        path.unlink()
    refused(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_refused_without_a_question(folder, file, monkeypatch):
    def asked(*_):
        raise AssertionError("nothing is asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    (folder / "own.py").write_text(f"open({str(folder / 'mark')!r}, 'w')")
    change(folder, file, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T"]})
    assert "auto_map" in refused(folder)
    with pytest.raises(UserError, match="auto_map"):
        check_scorer(folder)
    assert not (folder / "mark").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"n_layer": 10**9},
        {"n_layer": 90_000},
        {"n_layer": 3},
        {"vocab_size": 2**62},
        {"vocab_size": 10**6},
        {"n_positions": 10**6},
        {"n_positions": -1},
        {"n_embd": 10**6},
        {"n_head": 3},
        {"n_head": 0},
        {"n_layer": "2"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"model_type": "none"},
        {"model_type": None},
    ],
)
def test_a_configuration_of_another_size(folder, keys):
    change(folder, **keys)
    refused(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: None,
        lambda w: w.to(torch.int8),
        lambda w: w.to(torch.float8_e4m3fn),
        lambda w: w > 0,
        lambda w: w.index_fill(0, torch.tensor([1]), float("nan")),
        lambda w: w.index_fill(0, torch.tensor([1]), float("inf")),
        lambda w: w[:-1],
    ],
)
def test_weights_that_are_none(folder, make):
    change_weight(folder, make)
    message = refused(folder)
    assert "c_fc" in message or "parameters" in message  # fewer numbers than described are found first


def test_adapters_pickles_and_files_elsewhere(folder):
    adapter = folder / "adapter_config.json"
    adapter.write_text('{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}')
    refused(folder)
    adapter.unlink()
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    refused(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {WEIGHT: "../outside.safetensors"}}))
    assert "../outside.safetensors" in refused(folder)
