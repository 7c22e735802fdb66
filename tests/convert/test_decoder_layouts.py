"""Import and export of LLaDA, Dream, LLaMA and Qwen2, in several bfloat16 files with an index."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

import scmdm
from scmdm.cli import main
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.layouts import LAYOUTS
from scmdm.diffusion.state import State
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.model_files import ModelSpec, read_spec
from scmdm.models.safetensors_shards import write_shards
from tests.conftest import ROOT
from tests.convert.published import MASK, VOCAB, WORDS, write_tokenizer
from tests.models.test_decoder import see_everything, their_model
from tests.weights import weights_of

LLADA = {
    "model_type": "llada",
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 88,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500_000.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "max_sequence_length": 64,
    "mask_token_id": MASK,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB + 3,
}
DREAM = {
    "model_type": "Dream",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "hidden_act": "silu",
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "mask_token_id": MASK,
    "vocab_size": VOCAB + 3,
}
PUBLISHED = {"llada": LLADA, "dream": DREAM}


def write_published(directory, name, config=None, rows=VOCAB + 3, scale=1.0):
    """Random weights of a layout with the names that its authors' files have, in files of 20 kB."""
    directory.mkdir()
    model = DecoderConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=88, attention_bias=name == "dream")
    shapes = {n: p.shape for n, p in ModelSpec(model, DiffusionConfig(), rows, MASK, 8).build().named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        LAYOUTS.load(name).published_name(n): (scale * torch.randn(s, generator=generator)).bfloat16()
        for n, s in shapes.items()
    }
    write_shards(directory / "model.safetensors", weights.items(), 20_000, index=True)
    (directory / "config.json").write_text(json.dumps(PUBLISHED[name] if config is None else config))
    write_tokenizer(directory / "tokenizer.json")
    return weights


def test_names_are_those_of_the_published_files():
    """As the indices of GSAI-ML/LLaDA-8B-Base and Dream-org/Dream-v0-Base-7B list them, for a block."""
    block = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
    ours = ["norm1", "attn_q", "attn_k", "attn_v", "attn_out", "norm2", "mlp_gate", "mlp_up", "mlp_down"]
    for mine, theirs in zip(ours, block, strict=True):
        assert (
            LAYOUTS.load("llada").published_name(f"blocks.7.{mine}.weight")
            == f"model.transformer.blocks.7.{theirs}.weight"
        )
    outer = {
        "vocab_embed.embedding": "wte",
        "output_layer.norm_final.weight": "ln_f",
        "output_layer.linear.weight": "ff_out",
    }
    assert all(
        LAYOUTS.load("llada").published_name(mine) == f"model.transformer.{name}.weight" for mine, name in outer.items()
    )
    assert LAYOUTS.load("dream").published_name("blocks.3.attn_k.bias") == "model.layers.3.self_attn.k_proj.bias"


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_import_export_import_is_bitwise_the_same(tmp_path, name):
    published = write_published(tmp_path / "there", name)
    first, out, second = tmp_path / "first", tmp_path / "out", tmp_path / "second"
    assert main(["import", str(tmp_path / "there"), str(first), "length=16"]) == 0
    spec = read_spec(first)
    assert spec.model.logit_shift == (name == "dream") and spec.mask_id == MASK and spec.vocab_size == VOCAB + 3
    assert spec.model.rotary_base == PUBLISHED[name]["rope_theta"]
    assert main(["export", str(first), str(out), f"format={name}", "shard_gb=1e-5"]) == 0
    assert len(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == len(published)
    (out / "scmdm").rename(tmp_path / "aside")  # what the layout itself says must do
    assert main(["import", str(out), str(second), "length=16"]) == 0
    assert read_spec(second) == spec
    one, two = weights_of(first), weights_of(second)
    assert one.keys() == two.keys() and len(one) == len(published)
    for ours, value in one.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, two[ours]) and torch.equal(value, published[LAYOUTS.load(name).published_name(ours)])
    assert main(["sample", str(second), "num=2", "sampler.steps=4", "device=cpu"]) == 0


def test_head_width_survives_export_and_import(tmp_path, capsys):
    theirs = their_model("llama", False, 10_000.0, 1e-6, head_dim=12)
    theirs.resize_token_embeddings(len(WORDS))
    theirs.save_pretrained(tmp_path / "there")
    write_tokenizer(tmp_path / "there" / "tokenizer.json")
    assert main(["import", str(tmp_path / "there"), str(tmp_path / "ours"), "length=16"]) == 0
    assert read_spec(tmp_path / "ours").model.head_width == 12
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "format=llama"]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["head_dim"] == 12
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "not"), "format=llada"]) == 1
    assert "format=llada" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_autoregressive_model_is_a_base(tmp_path, kind, capsys):
    """As `transformers` saves it: it gets a mask, keeps its shift, sees everything; and goes back."""
    theirs = their_model(kind, kind == "llama", 10_000.0, 1e-6)
    theirs.resize_token_embeddings(len(WORDS))
    theirs.save_pretrained(tmp_path / "there", max_shard_size="20KB")
    write_tokenizer(tmp_path / "there" / "tokenizer.json")
    assert main(["import", str(tmp_path / "there"), str(tmp_path / "ours"), "length=16"]) == 0
    assert f"a mask token was added as id {len(WORDS)}" in capsys.readouterr().out
    ours = scmdm.load(tmp_path / "ours", device="cpu")
    ids = torch.randint(0, len(WORDS), (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = theirs(ids, attention_mask=see_everything(7)).logits
        found = ours.model.logits(ours.model.hidden(State(ids, torch.ones(2).double())).flatten(0, 1)).view(2, 7, -1)
    expected = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
    torch.testing.assert_close(found[..., : len(WORDS)], expected, rtol=1e-5, atol=1e-5)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), f"format={kind}"]) == 0
    again = (LlamaForCausalLM if kind == "llama" else Qwen2ForCausalLM).from_pretrained(tmp_path / "back")
    before = dict(theirs.named_parameters())
    for name, parameter in again.named_parameters():
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(parameter[: len(WORDS)] if grown else parameter, before[name]), name
    assert "causal model" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [
        ("dream", "num_hidden_layers", 3, "num_hidden_layers=3"),
        ("dream", "hidden_size", 10**9, "hidden_size=1000000000"),
        ("dream", "hidden_size", 64, "has shape"),
        ("dream", "vocab_size", VOCAB, f"vocab_size={VOCAB}"),
        ("llada", "embedding_size", VOCAB, f"embedding_size={VOCAB}"),
        ("llada", "embedding_size", None, f"vocab_size={VOCAB}"),
        ("dream", "num_key_value_heads", 3, "kv_heads=3"),
        ("dream", "rope_scaling", {"rope_type": "longrope", "factor": 4}, "rope_scaling"),
        ("dream", "hidden_act", "gelu", "hidden_act='gelu'"),
        ("dream", "mask_token_id", "x", "mask_token_id='x'"),
        ("llada", "alibi", True, "alibi=true"),
        ("llada", "layer_norm_type", "default", "layer_norm_type='default'"),
        ("llada", "mlp_hidden_size", 96, "has shape"),
    ],
)
def test_what_the_model_cannot_be_is_refused(tmp_path, capsys, name, key, value, reason):
    write_published(tmp_path / "there", name, {**PUBLISHED[name], key: value})
    assert main(["import", str(tmp_path / "there"), str(tmp_path / "out"), "length=16"]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


_MEASURE = """
import resource, sys
from pathlib import Path
from scmdm.config.conversion import ImportConfig
from scmdm.convert.importer import import_model
import transformers.models.auto  # what the tokenizer needs is no part of the measurement
from scmdm.data.tokenizers import ModelIds, open_model_tokenizer
open_model_tokenizer(Path(sys.argv[1]) / "tokenizer.json", ModelIds(16, 12))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_model(Path(sys.argv[1]), Path(sys.argv[2]), ImportConfig(length=16), shard_bytes=2**24)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_a_large_model_passes_through_one_file_at_a_time(tmp_path):
    """384 MB in files of 16 MB: at no time are more than a few of them in memory."""
    assert sys.platform == "linux" and resource.getpagesize()
    model = DecoderConfig(width=512, layers=24, heads=8, kv_heads=2, mlp_width=2048, attention_bias=True)
    shapes = {n: p.shape for n, p in ModelSpec(model, DiffusionConfig(), 16, MASK, 8).build().named_parameters()}
    (tmp_path / "there").mkdir()
    tensors = ((LAYOUTS.load("dream").published_name(n), torch.full(s, 0.01)) for n, s in shapes.items())
    write_shards(tmp_path / "there" / "model.safetensors", tensors, 2**24, index=True)
    sizes = {"hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8, "intermediate_size": 2048}
    (tmp_path / "there" / "config.json").write_text(json.dumps({**DREAM, **sizes}))
    write_tokenizer(tmp_path / "there" / "tokenizer.json")
    total = sum(file.stat().st_size for file in (tmp_path / "there").glob("*.safetensors"))
    assert total > 300e6
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "there"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 6 * 2**24
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) == pytest.approx(
        total, rel=0.01
    )
