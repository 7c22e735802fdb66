"""Configurations of LLaMA's family as `transformers` 4 and 5 write them: parity of logits, and what is refused."""

import io
import json
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, MistralConfig, MistralForCausalLM

import scmdm
from scmdm.cli import main
from scmdm.diffusion.state import State
from scmdm.models.model_files import read_spec
from tests.convert.published import WORDS, write_tokenizer
from tests.convert.test_decoder_layouts import DREAM, LLADA, write_published
from tests.models.test_decoder import SIZES, see_everything, their_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LENGTH = 48
# `config.json` of published models, without sizes.
PUBLISHED = {
    "Llama-2-7b": {
        "model_type": "llama",
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
    },
    "Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0",
        "use_cache": True,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 24,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "a2d-qwen2": {
        "model_type": "a2d-qwen2",
        "architectures": ["A2DQwen2LMHeadModel"],
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "layer_types": ["full_attention", "full_attention"],
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": False,
        "use_mrope": False,
        "use_sliding_window": False,
    },
}


def write_theirs(directory, kind="llama", **changes):
    """A model of `transformers` with another configuration: `changes` by field, an ellipsis removes one."""
    theirs = their_model(kind, False, 10_000.0, 1e-6, max_position_embeddings=LENGTH)
    theirs.resize_token_embeddings(len(WORDS))
    theirs.save_pretrained(directory)
    write_tokenizer(directory / "tokenizer.json")
    change(directory, **changes)
    return directory


def change(directory, **changes):
    path = directory / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def run(source, out, capsys, *keys):
    """The exit code of an import, and the one line that it ends with."""
    code = main(["import", str(source), str(out), *keys])
    captured = capsys.readouterr()
    assert code == 0 or (captured.err.count("\n") == 1 and not out.exists())
    return code, captured.err if code else captured.out


def our_logits(path, ids):
    ours = scmdm.load(path, device="cpu")
    with torch.no_grad():
        hidden = ours.model.hidden(State(ids, torch.ones(len(ids)).double()))
        return ours.model.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)[..., : len(WORDS)]


def their_logits(theirs, ids):
    with torch.no_grad():
        return theirs(ids, attention_mask=see_everything(ids.shape[1])).logits


def ids_of(length=LENGTH):
    return torch.randint(0, len(WORDS), (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("scaling", "base"),
    [(LLAMA3, 500_000.0), ({"rope_type": "linear", "factor": 4.0}, 20_000.0), ({"rope_type": "default"}, 70_000.0)],
)
@pytest.mark.parametrize("style", ["4", "4, older", "5"])
def test_rotary_angles_are_those_of_transformers(tmp_path, capsys, scaling, base, style):
    """`rope_scaling` with `rope_type` or `type`, and `rope_parameters`, against a model that has the scaling."""
    theirs = their_model("llama", False, base, 1e-6, rope_scaling=scaling, max_position_embeddings=LENGTH)
    theirs.resize_token_embeddings(len(WORDS))
    theirs.save_pretrained(tmp_path / "there")
    write_tokenizer(tmp_path / "there" / "tokenizer.json")
    older = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    parameters = {**scaling, "rope_theta": base}
    forms = {
        "4": {"rope_scaling": scaling, "rope_theta": base},
        "4, older": {"rope_scaling": older, "rope_theta": base},
        "5": {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": parameters, "torch_dtype": ...},
    }
    change(tmp_path / "there", **forms[style])
    code, _ = run(tmp_path / "there", tmp_path / "ours", capsys)
    assert code == 0
    raw, ids = their_logits(theirs, ids_of()), ids_of()
    plain = their_logits(their_model("llama", False, 10_000.0, 1e-6), ids)[..., : len(WORDS)]
    assert not torch.allclose(raw, plain, atol=1e-2), "the angles do not matter"
    found = our_logits(tmp_path / "ours", ids)
    torch.testing.assert_close(found[:, 1:], raw[:, :-1], rtol=1e-5, atol=1e-5)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "format=llama"]) == 0
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(their_logits(again, ids)[..., : len(WORDS)], raw, rtol=1e-5, atol=1e-5)
    (tmp_path / "back" / "scmdm").rename(tmp_path / "aside")
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "second")]) == 0
    assert read_spec(tmp_path / "second").model == read_spec(tmp_path / "ours").model


def small(ids):
    """Ids of a published vocabulary, inside of the small one."""
    return [id_ % len(WORDS) for id_ in ids] if isinstance(ids, list) else ids % len(WORDS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_come_in(tmp_path, capsys, name):
    fields = PUBLISHED[name]
    kind = "qwen2" if "qwen2" in fields["model_type"] else "llama"
    source = write_theirs(tmp_path / "there", kind)
    sizes = json.loads((source / "config.json").read_text())
    kept = {key: sizes[key] for key in SIZES if key in sizes} | {"max_position_embeddings": LENGTH}
    kept |= {name: small(fields[name]) for name in ("bos_token_id", "eos_token_id") if name in fields}
    (source / "config.json").write_text(json.dumps(fields | kept))
    mask = ["mask_id=3"] if name.startswith("a2d") else []  # which their tokenizers name
    code, said = run(source, tmp_path / "out", capsys, *mask)
    assert code == 0, said
    spec = read_spec(tmp_path / "out")
    assert spec.model.rotary_base == fields.get("rope_theta", 10_000.0)
    assert spec.model.rotary_scaling == ("llama3" if "3.1" in name else "none")
    assert spec.model.logit_shift == (not name.startswith("a2d"))
    assert spec.length == LENGTH


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_all_fields_that_the_installed_version_knows(tmp_path, capsys, kind):
    """The whole of `to_dict`, with the defaults that files leave out."""
    source = write_theirs(tmp_path / "there", "qwen2" if kind == "qwen2" else "llama")
    sizes = json.loads((source / "config.json").read_text())
    kept = {key: sizes[key] for key in SIZES if key in sizes} | {"head_dim": None, "sliding_window": None}
    whole = AutoConfig.for_model(kind, **kept, layer_types=None).to_dict()
    whole["architectures"] = [{"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[kind] + "ForCausalLM"]
    (source / "config.json").write_text(json.dumps(whole))
    code, said = run(source, tmp_path / "out", capsys)
    assert code == 0, said
    assert read_spec(tmp_path / "out").length == whole["max_position_embeddings"]


def test_mistral_computes_what_llama_does(tmp_path, capsys):
    torch.manual_seed(0)
    options = {**SIZES, "vocab_size": len(WORDS), "sliding_window": None}
    theirs = MistralForCausalLM(MistralConfig(**options)).eval()
    theirs.save_pretrained(tmp_path / "there")
    write_tokenizer(tmp_path / "there" / "tokenizer.json")
    assert run(tmp_path / "there", tmp_path / "ours", capsys, f"length={LENGTH}")[0] == 0
    found = our_logits(tmp_path / "ours", ids_of())
    torch.testing.assert_close(found[:, 1:], their_logits(theirs, ids_of())[:, :-1], rtol=1e-5, atol=1e-5)
    for window in (..., 4096):
        change(tmp_path / "there", sliding_window=window)
        code, said = run(tmp_path / "there", tmp_path / "no", capsys)
        assert code == 1 and "sliding_window" in said


REFUSED = [
    ("hidden_act", "gelu_pytorch_tanh"),
    ("hidden_activation", "gelu_pytorch_tanh"),
    ("sliding_window", 4096),
    ("use_sliding_window", True),
    ("layer_types", ["sliding_attention", "full_attention"]),
    ("layer_types", 3),
    ("bias", True),
    ("use_qk_norm", True),
    ("qk_layernorm", True),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("embedding_multiplier", 12.0),
    ("residual_multiplier", 0.22),
    ("attention_multiplier", 0.015625),
    ("logits_scaling", 8.0),
    ("scale_emb", 12),
    ("query_pre_attn_scalar", 256),
    ("no_rope_layers", [1, 0]),
    ("num_local_experts", 8),
    ("partial_rotary_factor", 0.5),
    ("rope_interleaved", True),
    ("use_mrope", True),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("pruned_heads", {"0": [1]}),
    ("is_encoder_decoder", True),
    ("a_field_of_next_year", 1),
    ("a_field_of_next_year", False),
    ("model_type", "olmo2"),
    ("num_attention_heads", 2.5),
    ("num_attention_heads", "4"),
    ("tie_word_embeddings", "yes"),
    ("rope_theta", 0),
    ("num_hidden_layers", 1),
    ("logit_shift", "yes"),
    ("logit_shift", 1),
    ("is_causal", "no"),
    ("bos_token_id", len(WORDS)),
    ("bos_token_id", "<s>"),
    ("bos_token_id", [0, 1]),
    ("eos_token_id", len(WORDS)),
    ("eos_token_id", [0, len(WORDS)]),
    ("eos_token_id", "</s>"),
    ("eos_token_id", [0, "</s>"]),
    ("eos_token_id", True),
    ("eos_token_id", -2),
    ("rope_scaling", "linear"),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0}),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 24]}),
    ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": "yarn"}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "beta_fast": 1.0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "attention_factor": -1.0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "truncate": 0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "finetuned": True}),
    ("rope_scaling", {"type": "dynamic"}),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0, "alpha": 8.0}),
    ("rope_scaling", {"type": "linear", "factor": "2"}),
    ("rope_scaling", {"type": "linear", "rope_type": "yarn", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {**LLAMA3, "high_freq_factor": 1.0}),
    ("rope_scaling", {"factor": 2.0}),
    ("rope_scaling", ["linear", 2.0]),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),  # beside another `rope_theta`
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
    ("rope_parameters", {"rope_type": ["linear"]}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[f"{f}-{n}" for n, (f, _) in enumerate(REFUSED)])
@pytest.mark.parametrize("written", [True, False], ids=["auto", "forced"])
def test_a_field_that_changes_the_arithmetic_is_refused_by_name(tmp_path, capsys, field, value, written):
    """Also where the layout is given."""
    source = write_theirs(tmp_path / "there", **{field: value})
    code, said = run(source, tmp_path / "out", capsys, *([] if written else ["format=llama"]))
    name = {"rope_scaling": "rope", "rope_parameters": "rope"}.get(field, field)  # or a field inside it
    assert code == 1 and name in said and str(source) in said


def test_a_field_is_ignored_on_request_alone(tmp_path, capsys):
    source = write_theirs(tmp_path / "there", a_note={"of": "the authors"})
    code, said = run(source, tmp_path / "out", capsys)
    assert code == 1 and "ignore=" in said and "a_note" in said
    code, said = run(source, tmp_path / "out", capsys, "ignore=[another]")
    assert code == 1 and "another" in said
    assert run(source, tmp_path / "out", capsys, "ignore=[a_note]")[0] == 0


def test_ignored_fields_are_printed(tmp_path, capsys):
    source = write_theirs(tmp_path / "there", rope_theta=500_000.0, eos_token_id=9999)
    code, said = run(source, tmp_path / "out", capsys, "ignore=[rope_theta,eos_token_id]")
    assert code == 0 and "rope_theta=500000.0" in said and "eos_token_id=9999" in said
    assert read_spec(tmp_path / "out").model.rotary_base == 10_000.0


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (..., ...), (-1, -1), (0, [0, None])])
def test_a_model_without_ids_of_specials_comes_in(tmp_path, capsys, bos, eos):
    """Null, absent, or -1 as in older files; padding is not read."""
    source = write_theirs(tmp_path / "there", bos_token_id=bos, eos_token_id=eos, pad_token_id=-1)
    assert run(source, tmp_path / "out", capsys)[0] == 0


def test_a_number_of_blocks_is_compared_with_the_weights(tmp_path, capsys):
    code, said = run(write_theirs(tmp_path / "there", num_hidden_layers=1), tmp_path / "out", capsys)
    assert code == 1 and "num_hidden_layers=1" in said and "2 blocks" in said


@pytest.mark.parametrize("key", ["experts_per_token=3", "weights=raw", "framing=chats"])
def test_a_key_without_effect_is_refused(tmp_path, capsys, key):
    source = write_theirs(tmp_path / "there")
    code, said = run(source, tmp_path / "out", capsys, key)
    assert code == 1 and key in said


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dream", "sliding_window", 4096),  # without effect
        ("dream", "attention_bias", False),  # its code has biases whatever this says
        ("llada", "rope_full_precision", True),
        ("llada", "multi_query_attention", None),
    ],
)
def test_fields_without_effect_come_in(tmp_path, capsys, name, field, value):
    write_published(tmp_path / "there", name, {**{"llada": LLADA, "dream": DREAM}[name], field: value})
    assert run(tmp_path / "there", tmp_path / "out", capsys, "length=16")[0] == 0


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("dream", "block_size", 32),
        ("dream", "use_sliding_window", True),
        ("dream", "num_experts", 8),
        ("llada", "block_type", ...),  # of the original code's defaults, none is LLaDA's
        ("llada", "activation_type", ...),
        ("llada", "layer_norm_type", ...),
        ("llada", "rope", ...),
        ("llada", "rope", 1),
        ("llada", "layer_norm_with_affine", False),
        ("llada", "input_emb_norm", True),
        ("llada", "scale_logits", True),
        ("llada", "rope_scaling_factor", 4.0),
        ("llada", "n_heads", 1.5),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, capsys, name, field, value):
    config = {**{"llada": LLADA, "dream": DREAM}[name], field: value}
    write_published(tmp_path / "there", name, {k: v for k, v in config.items() if v is not ...})
    code, said = run(tmp_path / "there", tmp_path / "out", capsys, "length=16")
    assert code == 1 and field in said


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_token_id": 3},
        {"architectures": None},
        {"architectures": ["LlamaForMaskedDiffusion"]},
        {"architectures": ["LlamaForCausalLM", "Other"]},
        {"auto_map": {"AutoModel": "modeling.Model"}},
        {"is_causal": False},
    ],
)
def test_the_shift_is_asked_for_where_the_files_do_not_say(tmp_path, capsys, changes):
    source = write_theirs(tmp_path / "there", **changes)
    code, said = run(source, tmp_path / "no", capsys)
    assert code == 1 and "logit_shift=true" in said and "logit_shift=false" in said
    for shift in (True, False):
        out = tmp_path / str(shift)
        assert run(source, out, capsys, f"logit_shift={str(shift).lower()}")[0] == 0
        assert read_spec(out).model.logit_shift is shift


def test_the_shift_is_asked_for_where_the_tokenizer_has_a_mask(tmp_path, capsys):
    source = write_theirs(tmp_path / "there")
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 3, "content": "<|mask|>"})
    content["model"]["vocab"] = {("<|mask|>" if i == 3 else w): i for w, i in content["model"]["vocab"].items()}
    (source / "tokenizer.json").write_text(json.dumps(content))
    code, said = run(source, tmp_path / "no", capsys)
    assert code == 1 and "logit_shift=" in said
    assert run(source, tmp_path / "out", capsys, "logit_shift=false")[0] == 0
    assert read_spec(tmp_path / "out").mask_id == 3


def test_the_shift_of_dream_and_of_what_is_named_so(tmp_path, capsys):
    for architectures, expected in ((["DreamModel"], 0), (["DreamForCausalLM"], 1)):
        source = tmp_path / architectures[0]
        write_published(source, "dream", {**DREAM, "architectures": architectures})
        code, said = run(source, tmp_path / f"out{expected}", capsys, "length=16")
        assert code == expected and (not code or "logit_shift=" in said)
    assert read_spec(tmp_path / "out0").model.logit_shift


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_export_states_its_shift(tmp_path, capsys, kind, shift):
    source = write_theirs(tmp_path / "there", kind)
    assert run(source, tmp_path / "ours", capsys, f"logit_shift={str(shift).lower()}")[0] == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), f"format={kind}"]) == 0
    (tmp_path / "back" / "scmdm").rename(tmp_path / "aside")
    assert run(tmp_path / "back", tmp_path / "again", capsys)[0] == 0
    assert read_spec(tmp_path / "again") == read_spec(tmp_path / "ours")


def test_the_length_is_the_models_own(tmp_path, capsys):
    write_published(tmp_path / "llada", "llada")
    assert run(tmp_path / "llada", tmp_path / "one", capsys)[0] == 0
    assert read_spec(tmp_path / "one").length == LLADA["max_sequence_length"]
    source = write_theirs(tmp_path / "llama")
    assert run(source, tmp_path / "two", capsys)[0] == 0
    assert read_spec(tmp_path / "two").length == LENGTH
    for value, named in ((..., "length="), ("long", "max_position_embeddings"), (1, "max_position_embeddings")):
        change(source, max_position_embeddings=value)
        code, said = run(source, tmp_path / "no", capsys)
        assert code == 1 and named in said
    assert run(source, tmp_path / "three", capsys, "length=16")[0] == 0


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = ["rope_theta", "rope_scaling", "rope_parameters", "layer_types", "head_dim", "architectures", "logit_shift"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_theirs(tmp_path_factory.mktemp("llama") / "there", rope_scaling=LLAMA3)


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 100), value=_VALUES)
def test_no_value_of_a_field_ends_in_a_traceback(llama, place, value):
    content = json.loads((llama / "config.json").read_text())
    names = [*content, *_FIELDS, "new"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "there")
        source.mkdir()
        for name in ("model.safetensors", "tokenizer.json"):
            (source / name).symlink_to(llama / name)
        (source / "config.json").write_text(json.dumps({**content, names[place % len(names)]: value}))
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            code = main(["import", str(source), str(Path(folder, "out"))])
        assert code == 0 or (code == 1 and said.getvalue().count("\n") == 1)
