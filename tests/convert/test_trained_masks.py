"""The mask of a model that was trained with one: its id is stated once, and is not guessed."""

import json

import pytest

from scmdm.cli import main
from scmdm.models.model_files import read_spec
from tests.convert.published import WORDS
from tests.convert.test_block_layouts import SDAR
from tests.convert.test_decoder_families import LENGTH, save, their_model
from tests.convert.test_decoder_layouts import DREAM, LLADA, write_published

ROWS = len(WORDS)
A2D = {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}


def with_mask_in_tokenizer(source, id_=3):
    """Make a word the mask of the tokenizer."""
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": id_, "content": "<|mask|>"})
    content["model"]["vocab"] = {("<|mask|>" if i == id_ else w): i for w, i in content["model"]["vocab"].items()}
    (source / "tokenizer.json").write_text(json.dumps(content))
    return source


def imported(source, capsys, *keys):
    code = main(["import", str(source), str(source.with_name(f"out{len(list(source.parent.iterdir()))}")), *keys])
    said = capsys.readouterr()
    return code, said.out + said.err


def qwen3(path, **stated):
    return save(their_model("qwen3", head_dim=12), path, **stated)


@pytest.mark.parametrize("stated", [A2D, {**SDAR, "mask_token_id": None}], ids=["a2d", "sdar"])
def test_a_mask_that_nothing_names_is_asked_for(tmp_path, capsys, stated):
    """The first unused id, which an autoregressive model gets, would be a token that it has never seen."""
    source = qwen3(tmp_path / "there", **stated)
    code, said = imported(source, capsys)
    assert code == 1 and "mask_id=" in said
    assert imported(source, capsys, "mask_id=3")[0] == 0
    code, said = imported(with_mask_in_tokenizer(source), capsys)
    assert code == 0 and "'<|mask|>' (id 3)" in said


@pytest.mark.parametrize(("name", "fields"), [("dream", DREAM), ("llada", LLADA)])
def test_so_is_that_of_layouts_of_their_own(tmp_path, capsys, name, fields):
    write_published(tmp_path / "there", name, {**fields, "mask_token_id": None})
    code, said = imported(tmp_path / "there", capsys, "length=16")
    assert code == 1 and "mask_id=" in said


def test_an_autoregressive_model_gets_a_mask(tmp_path, capsys):
    source = save(their_model("llama"), tmp_path / "there")
    code, said = imported(source, capsys)
    assert code == 0 and f"(id {ROWS}) of {ROWS + 1}" in said


def test_configuration_and_tokenizer_must_not_differ(tmp_path, capsys):
    source = with_mask_in_tokenizer(qwen3(tmp_path / "there", **A2D, mask_token_id=5))
    code, said = imported(source, capsys)
    assert code == 1 and "mask_token_id=5" in said and "(id 3)" in said and "mask_id=" in said
    assert main(["import", str(source), str(tmp_path / "ours"), "mask_id=5"]) == 0
    assert read_spec(tmp_path / "ours").mask_id == 5


def test_a_trained_mask_has_an_embedding_and_ends_no_text(tmp_path, capsys):
    code, said = imported(qwen3(tmp_path / "far", **A2D, mask_token_id=ROWS), capsys)
    assert code == 1 and f"mask_id={ROWS}" in said
    source = with_mask_in_tokenizer(qwen3(tmp_path / "end", **A2D, eos_token_id=[0, 3]))
    code, said = imported(source, capsys)
    assert code == 1 and "eos_token_id" in said


def test_all_end_tokens_are_printed(tmp_path, capsys):
    source = with_mask_in_tokenizer(qwen3(tmp_path / "there"))  # as another special token: 3
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    code, said = imported(source, capsys, "mask_id=5", "logit_shift=false", f"length={LENGTH}")
    assert code == 0 and "'<|endoftext|>' (id 0)" in said and "'<|mask|>' (id 3)" in said


def test_a_folder_without_a_tokenizer_is_named_with_the_files_that_it_lacks(tmp_path, capsys):
    source = save(their_model("llama"), tmp_path / "there")
    (source / "tokenizer.json").unlink()
    (source / "generation_config.json").write_text("{}")
    code, said = imported(source, capsys)
    assert code == 1 and "tokenizer=" in said and "tokenizer.json" in said


def test_a_model_of_scmdm_needs_no_import(tmp_path, capsys):
    source = save(their_model("llama"), tmp_path / "there")
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    code, said = imported(tmp_path / "ours", capsys)
    assert code == 1 and "model.json" in said


def test_a_layout_is_not_proposed_for_another_network(tmp_path, capsys):
    source = save(their_model("llama"), tmp_path / "there", model_type="phi3")
    code, said = imported(source, capsys)
    assert code == 1 and "phi3" in said and "format=" not in said
