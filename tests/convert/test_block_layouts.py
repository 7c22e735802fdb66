"""Published models of blocks: SDAR against Qwen3 of `transformers` with a mask of blocks, and what files do not say."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from scmdm.cli import main
from scmdm.models.model_files import read_spec
from tests.convert.published import write_mdlm, write_tokenizer
from tests.convert.test_decoder_families import LENGTH, assert_parity, random_ids, save, their_logits, their_model
from tests.sampling.small_models import export

SIZE, MASK = 4, 3
# As in the files of JetLM/SDAR-*-Chat, whose network is Qwen3's.
SDAR = {
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "block_size": SIZE,
    "fuse_cross_entropy": True,
    "mask_token_id": MASK,
}
A2D = {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "mask_token_id": MASK}


def qwen3(**changes):
    return their_model("qwen3", **{"head_dim": 12, "rope_theta": 1e6, **changes})


def imported(source, out, *keys):
    return main(["import", str(source), str(out), f"length={LENGTH}", *keys])


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_sdar_is_qwen3_with_blocks(tmp_path, changes):
    theirs = qwen3(**changes)
    assert imported(save(theirs, tmp_path / "there", **SDAR), tmp_path / "ours") == 0
    spec = read_spec(tmp_path / "ours")
    assert spec.diffusion.block_length == SIZE and spec.mask_id == MASK and not spec.model.logit_shift
    assert_parity(f"sdar {changes}", tmp_path / "ours", theirs, SIZE)
    whole = their_logits(theirs, random_ids())
    assert not torch.allclose(their_logits(theirs, random_ids(), SIZE), whole, atol=1e-2)

    back = tmp_path / "back"
    assert main(["export", str(tmp_path / "ours"), str(back), "format=sdar"]) == 0
    described = json.loads((back / "config.json").read_text())
    assert SDAR.items() <= {**described, "fuse_cross_entropy": True}.items()
    (back / "scmdm").rename(tmp_path / "aside")  # what the layout itself says must do
    assert imported(back, tmp_path / "second") == 0
    assert read_spec(tmp_path / "second") == spec
    (back / "config.json").write_text(json.dumps({**described, "model_type": "qwen3"}))
    again = AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    assert torch.equal(their_logits(again, random_ids(), SIZE), their_logits(theirs, random_ids(), SIZE))


@pytest.mark.parametrize(
    ("stated", "keys", "named"),
    [
        ({"block_size": None}, [], "block_length="),
        ({}, ["block_length=8"], "block_size=4"),
        ({"block_size": 0}, [], "block_size=0"),
        ({"block_size": "4"}, [], "block_size='4'"),
        ({"use_regular_causal": True}, [], "use_regular_causal=true"),
        ({"logit_shift": True}, [], "logit_shift=true"),
    ],
    ids=str,
)
def test_blocks_that_sdar_does_not_state_are_refused(tmp_path, capsys, stated, keys, named):
    source = save(qwen3(), tmp_path / "there", **{**SDAR, **stated})
    assert imported(source, tmp_path / "ours", *keys) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("stated", "keys"),
    [
        ({**SDAR, "block_size": None}, ["block_length=8"]),
        (SDAR, ["block_length=8", "ignore=[block_size]"]),
        (A2D, ["block_length=8"]),
    ],
    ids=["sdar", "sdar, ignored", "a2d"],
)
def test_the_import_takes_the_blocks_that_the_files_do_not_state(tmp_path, capsys, stated, keys):
    theirs = qwen3()
    assert imported(save(theirs, tmp_path / "there", **stated), tmp_path / "ours", *keys) == 0
    assert "block_length=8" in capsys.readouterr().out
    assert read_spec(tmp_path / "ours").diffusion.block_length == 8
    assert_parity("blocks of 8", tmp_path / "ours", theirs, 8)


def test_a_name_that_says_blocks_is_asked_for_them(tmp_path, capsys):
    """dllm's models for block diffusion have the configuration of its others, and `bd3lm` in their names."""
    source = save(qwen3(), tmp_path / "Qwen3-0.6B-diffusion-BD3LM-v0.1", **A2D)
    assert imported(source, tmp_path / "ours") == 1
    assert "block_length=" in capsys.readouterr().err
    plain = source.rename(tmp_path / "mdlm")
    assert imported(plain, tmp_path / "ours") == 0
    assert read_spec(tmp_path / "ours").diffusion.block_length is None
    assert "block_length=null" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("format_", "field"), [("qwen3", "block_length"), ("sdar", "block_size"), ("llada", None), ("dream", None)]
)
def test_an_export_states_the_blocks_or_is_refused(tmp_path, capsys, format_, field):
    assert imported(save(qwen3(), tmp_path / "there", **SDAR), tmp_path / "ours") == 0
    code = main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), f"format={format_}"])
    if field is None:
        assert code == 1 and f"diffusion.block_length={SIZE}" in capsys.readouterr().err
        return
    assert code == 0 and json.loads((tmp_path / "back" / "config.json").read_text())[field] == SIZE
    (tmp_path / "back" / "scmdm").rename(tmp_path / "aside")
    assert imported(tmp_path / "back", tmp_path / "again") == 0
    assert read_spec(tmp_path / "again").diffusion.block_length == SIZE


def test_a_model_without_blocks_is_no_sdar_and_a_dit_has_no_layout_for_blocks(tmp_path, capsys):
    assert imported(save(qwen3(), tmp_path / "there", **A2D), tmp_path / "ours") == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "format=sdar"]) == 1
    assert "diffusion.block_length=null" in capsys.readouterr().err
    place = export(tmp_path / "dit", block_length=SIZE)
    assert main(["export", str(place), str(tmp_path / "back"), "format=mdlm"]) == 1
    assert f"diffusion.block_length={SIZE}" in capsys.readouterr().err


def test_blocks_of_a_network_with_one_time_are_refused(tmp_path, capsys):
    source = write_mdlm(tmp_path / "there")
    keys = ["block_length=4", "time_conditioning=true"]
    assert main(["import", str(source), str(tmp_path / "ours"), *keys]) == 1
    assert "block_length=4" in capsys.readouterr().err
    assert main(["import", str(source), str(tmp_path / "ours"), "block_length=4"]) == 0


@pytest.mark.parametrize("key", ["block_length=4", "length=8", "logit_shift=false", "mask_id=2"])
def test_keys_without_effect_on_an_export_of_scmdm_are_refused(tmp_path, capsys, key):
    assert imported(save(qwen3(), tmp_path / "there", **A2D), tmp_path / "ours") == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "format=qwen3"]) == 0
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "again"), key]) == 1
    assert key.partition("=")[0] in capsys.readouterr().err
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "again"), "format=qwen3"]) == 0


@pytest.mark.parametrize(
    ("kind", "tensor", "named"),
    [
        ("llada2_moe_veomni", "model.layers.1.mlp.experts.gate_proj", "experts"),  # merged by dFactory
        ("sdar_moe", "model.layers.0.mlp.gate.weight", "sdar_moe"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight", "qwen3_moe"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "mixtral"),
        ("bert", "bert.embeddings.word_embeddings.weight", "bert"),
        ("roberta", "roberta.embeddings.word_embeddings.weight", "roberta"),
        ("modernbert", "model.embeddings.tok_embeddings.weight", "modernbert"),
        ("gemma3_text", "model.embed_tokens.weight", "gemma3_text"),
    ],
)
@pytest.mark.parametrize("format_", ["auto", "qwen3"])
def test_networks_that_scmdm_does_not_have_are_refused_by_name(tmp_path, capsys, kind, tensor, named, format_):
    (tmp_path / "there").mkdir()
    save_file({tensor: torch.ones(16, 8)}, tmp_path / "there" / "model.safetensors")
    (tmp_path / "there" / "config.json").write_text(json.dumps({"model_type": kind}))
    write_tokenizer(tmp_path / "there" / "tokenizer.json")
    assert imported(tmp_path / "there", tmp_path / "ours", f"format={format_}") == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
