"""LLaDA-MoE and LLaDA2 against models of `transformers` with the same body, export, and upcycling."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from scmdm.cli import main
from scmdm.diffusion.state import State
from scmdm.models.model_files import read_model, read_spec
from tests.convert.published import WORDS, write_tokenizer
from tests.convert.test_decoder_families import (
    LENGTH,
    SIZES,
    assert_parity,
    our_logits,
    random_ids,
    save,
    their_model,
)
from tests.weights import weights_of

LAYERS, EXPERTS = SIZES["num_hidden_layers"], 8
SAME = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50_000.0,
    "hidden_act": "silu",
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
# As in the files of LLaDA-MoE-7B-A1B and LLaDA2.0-mini.
LLADA_MOE = {
    **SAME,
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "dense_intermediate_size": 88,
    "expert_intermediate_size": 24,
    "moe_layer_freq": [1] * LAYERS,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "output_router_logits": False,
    "pad_token_id": 0,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rope_scaling": None,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "use_cache": False,
}
LLADA2 = {
    **SAME,
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 12,
    "intermediate_size": 88,
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_shared_experts": 1,
    "output_router_logits": False,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 6,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "topk_group": 2,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
}


def their_qwen3_moe():
    options = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": False}
    return their_model("qwen3_moe", head_dim=8, rope_theta=50_000.0, mlp_only_layers=[], **options)


def their_olmoe():
    """Its norms of queries and keys are those of all heads together: one head, as in LLaDA-MoE's files."""
    options = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "intermediate_size": 24, "norm_topk_prob": False}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return their_model("olmoe", rope_theta=50_000.0, rms_norm_eps=1e-6, **options, **heads)


def their_glm4_moe():
    model = their_model(
        "glm4_moe",
        head_dim=12,
        rope_theta=50_000.0,
        rms_norm_eps=1e-6,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        partial_rotary_factor=0.5,
        use_qk_norm=True,
    )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, EXPERTS))
    return model


def llada2_tensors(theirs):
    """The weights of GLM-4's mixture under LLaDA2's names, with queries, keys and values in one matrix."""
    tensors = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("embed_tokens", "word_embeddings").replace("e_score_correction_bias", "expert_bias")
        name = name.replace("self_attn.q_norm", "attention.query_layernorm")
        name = name.replace("self_attn.k_norm", "attention.key_layernorm").replace(
            "self_attn.o_proj", "attention.dense"
        )
        if "self_attn" not in name:
            tensors[name] = value.clone()
        elif "q_proj" in name:
            block = name.partition("self_attn")[0]
            parts = [theirs.state_dict()[f"{block}self_attn.{letter}_proj.weight"] for letter in "qkv"]
            tensors[f"{block}attention.query_key_value.weight"] = torch.cat(parts)
    return tensors


def write(directory, described, tensors):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"mask_token_id": 3, **described}))
    save_file(tensors, directory / "model.safetensors")
    write_tokenizer(directory / "tokenizer.json")
    return directory


def published(kind, directory, **changes):
    """The model of `transformers`, and a directory with it in the published layout."""
    if kind == "llada2":
        theirs = their_glm4_moe()
        return theirs, write(directory, {**LLADA2, **changes}, llada2_tensors(theirs))
    theirs = their_olmoe() if kind == "olmoe" else their_qwen3_moe()
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1} if kind == "olmoe" else {}
    return theirs, write(directory, {**LLADA_MOE, **heads, **changes}, dict(theirs.state_dict()))


@pytest.mark.parametrize(
    ("kind", "layout", "more"),
    [("qwen3_moe", "llada_moe", []), ("olmoe", "llada_moe", []), ("llada2", "llada2", [f"block_length={LENGTH}"])],
)
def test_a_published_mixture_computes_the_same_and_goes_back(tmp_path, kind, layout, more):
    theirs, source = published(kind, tmp_path / "there")
    assert main(["import", str(source), str(tmp_path / "ours"), *more]) == 0
    spec = read_spec(tmp_path / "ours")
    assert spec.model.experts == EXPERTS and not spec.model.logit_shift
    assert_parity(kind, tmp_path / "ours", theirs)

    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), f"format={layout}"]) == 0
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    # Import and export add the row of the mask to embedding and head, which the tokenizer lacks.
    rows = len(WORDS)
    assert all(
        torch.equal(value, after[name][:rows] if value.shape[0] == rows else after[name])
        for name, value in before.items()
    )
    (tmp_path / "back" / "scmdm").rename(tmp_path / "aside")
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "second"), *more]) == 0
    assert read_spec(tmp_path / "second") == spec
    one, two = weights_of(tmp_path / "ours"), weights_of(tmp_path / "second")
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("llada2", "score_function", "softmax"),
        ("llada2", "num_experts_per_tok", 1),
        ("llada2", "norm_topk_prob", False),
        ("llada2", "use_qk_norm", False),
        ("llada2", "n_group", 3),
        ("llada2", "moe_router_enable_expert_bias", False),
        ("llada2", "num_nextn_predict_layers", 1),
        ("llada2", "first_k_dense_replace", 2),
        ("qwen3_moe", "moe_layer_freq", [1, 0]),
        ("qwen3_moe", "moe_layer_freq", [1]),
        ("qwen3_moe", "moe_router_enable_expert_bias", True),
        ("qwen3_moe", "norm_topk_prob", True),
        ("qwen3_moe", "clip_qkv", 8.0),
        ("qwen3_moe", "routed_scaling_factor", 2.5),
        ("qwen3_moe", "shared_expert_intermediate_size", 24),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, capsys, kind, field, value):
    source = published(kind, tmp_path / "there", **{field: value})[1]
    assert main(["import", str(source), str(tmp_path / "ours"), f"block_length={LENGTH}"]) == 1
    said = capsys.readouterr().err
    keys = {"n_group": "router_groups", "first_k_dense_replace": "dense_layers", "num_experts_per_tok": "experts per"}
    assert keys.get(field, field) in said and not (tmp_path / "ours").exists()


def test_a_missing_or_odd_expert_is_refused(tmp_path, capsys):
    for number, change in enumerate(("missing", "odd")):
        source = published("llada2", tmp_path / f"there{number}")[1]
        tensors = load_file(source / "model.safetensors")
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        if change == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, source / "model.safetensors")
        assert main(["import", str(source), str(tmp_path / f"ours{number}"), "block_length=4"]) == 1
        assert "experts.*.up_proj" in capsys.readouterr().err


def test_a_model_of_blocks_needs_their_length_and_a_dense_model_is_not_written_as_a_mixture(tmp_path, capsys):
    source = published("llada2", tmp_path / "there")[1]
    assert main(["import", str(source), str(tmp_path / "ours")]) == 1
    assert "block_length" in capsys.readouterr().err
    dense = save(their_model("llama"), tmp_path / "dense")
    assert main(["import", str(dense), str(tmp_path / "llama"), "logit_shift=false", "block_length=4"]) == 0
    assert main(["export", str(tmp_path / "llama"), str(tmp_path / "no"), "format=llada2"]) == 1
    assert "format=llada2" in capsys.readouterr().err


@pytest.mark.parametrize("per_token", [1, 2])
def test_upcycling_keeps_what_the_dense_model_computes(tmp_path, per_token):
    source = save(their_model("qwen3", head_dim=12), tmp_path / "there")
    assert main(["import", str(source), str(tmp_path / "dense")]) == 0
    more = ["experts=4", f"experts_per_token={per_token}"]
    assert main(["import", str(source), str(tmp_path / "mixture"), *more]) == 0
    model = read_spec(tmp_path / "mixture").model
    assert (model.experts, model.experts_per_token, model.router_renormalise) == (4, per_token, True)
    weights, dense = weights_of(tmp_path / "mixture"), weights_of(tmp_path / "dense")
    for number in range(4):
        assert torch.equal(weights["blocks.1.experts.up.weight"][number], dense["blocks.1.mlp_up.weight"])
    routers = [weights[f"blocks.{number}.experts.router.weight"] for number in range(LAYERS)]
    assert routers[0].std() > 0.01 and not torch.equal(*routers)
    ids = random_ids()
    torch.testing.assert_close(
        our_logits(tmp_path / "mixture", ids), our_logits(tmp_path / "dense", ids), rtol=1e-5, atol=1e-5
    )


def test_only_a_dense_decoder_is_upcycled(tmp_path, capsys):
    source = published("qwen3_moe", tmp_path / "there")[1]
    assert main(["import", str(source), str(tmp_path / "ours"), "experts=4"]) == 1
    assert "experts=4" in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_sampling_in_bfloat16_routes_in_float32(tmp_path):
    source = published("llada2", tmp_path / "there")[1]
    assert main(["import", str(source), str(tmp_path / "ours"), f"block_length={LENGTH}"]) == 0
    model = read_model(tmp_path / "ours", dtype=torch.bfloat16).model
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32 and "experts" in name}
    assert kept == {name for name, _ in model.named_parameters() if ".router." in name} and kept
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(State(random_ids(), torch.ones(2).double())).isfinite().all()
