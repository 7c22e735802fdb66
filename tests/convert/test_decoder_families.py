"""Every family of decoders against `transformers`: logits, export, and what a configuration may say."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import scmdm
from scmdm.cli import main
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.layouts import LAYOUTS
from scmdm.convert.layout import EMBEDDING, TokenIds, parameter_names
from scmdm.convert.published_files import PublishedFiles
from scmdm.diffusion.packing import make_packing
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.model_files import ModelSpec, read_spec
from tests.convert.published import WORDS, write_tokenizer
from tests.weights import weights_of

LENGTH = 48
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": LENGTH,
    "attn_implementation": "eager",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHORT = 16  # of a pretraining
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": SHORT,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
# By name: the type in `transformers`, and what differs from SIZES. The part before the colon is the layout.
MODELS = {
    "llama": ("llama", {}),
    "llama: tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama: all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama: 3.1": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500_000.0}),
    "llama: linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama: dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}),
    "llama: dynamic, short": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": SHORT},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral: wide heads": ("mistral", {"sliding_window": None, "head_dim": 12, "rope_theta": 1e6}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen2: tied, yarn": ("qwen2", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3: biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3: yarn, own turns": ("qwen3", {"head_dim": 16, "rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5}}),
    "qwen3: yarn, factor": ("qwen3", {"head_dim": 16, "rope_scaling": {**YARN, "attention_factor": 1.5}}),
    "qwen3: yarn, mscale": (
        "qwen3",
        {"head_dim": 16, "rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4, "truncate": False}},
    ),
    "qwen3: yarn, its own length": ("qwen3", {"head_dim": 16, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    "granite": ("granite", MULTIPLIERS),
    "granite: biases": ("granite", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
}


def their_model(kind, **changes):
    """A random model of `transformers`; norms and biases, which start at constants, are random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **copy.deepcopy(changes)}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def save(model, directory, **changes):
    model.save_pretrained(directory)
    write_tokenizer(directory / "tokenizer.json")
    if changes:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def random_ids(length=LENGTH):
    return torch.randint(0, len(WORDS), (2, length), generator=torch.Generator().manual_seed(0))


def their_logits(model, ids, block_length=None):
    """Logits with a mask that hides later blocks; without blocks, nothing."""
    blocks = torch.arange(ids.shape[1]) // (block_length or ids.shape[1])
    hidden = (blocks[None] > blocks[:, None]).float() * torch.finfo().min
    with torch.no_grad():
        return model(ids, attention_mask=hidden[None, None]).logits[..., : len(WORDS)]


def our_logits(directory, ids, packing=None):
    """Logits of the position itself, without the shift."""
    model = scmdm.load(directory, device="cpu").model
    model.config.logit_shift = False
    with torch.no_grad():
        hidden = model.hidden(State(ids, torch.ones(len(ids)).double(), packing=packing))
        return model.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)[..., : len(WORDS)]


def assert_parity(name, directory, theirs, block_length=None):
    """Compare the logits of an imported model with those of the original, but for the mask's, and print the largest
    difference (pytest -s)."""
    ids, mask = random_ids(), read_spec(directory).mask_id
    kept = torch.arange(len(WORDS)) != mask
    found, expected = our_logits(directory, ids)[..., kept], their_logits(theirs, ids, block_length)[..., kept]
    print(f"{name}: {float((found - expected).abs().max()):.1e} of {float(expected.abs().max()):.0f}")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_computes_what_transformers_does_and_goes_back(tmp_path, name):
    kind, changes = MODELS[name]
    theirs = their_model(kind, **changes)
    source = save(theirs, tmp_path / "there")
    assert main(["import", str(source), str(tmp_path / "ours"), f"length={LENGTH}"]) == 0
    assert read_spec(tmp_path / "ours").model.logit_shift
    ids = random_ids()
    expected, plain = their_logits(theirs, ids), their_logits(their_model("llama"), ids)
    same = name in ("llama", "mistral", "llama: dynamic")
    assert torch.allclose(expected, plain, atol=1e-2) == same, "the changes do not matter"
    assert_parity(name, tmp_path / "ours", theirs)

    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), f"format={kind}"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    assert torch.equal(their_logits(again, ids), expected)
    (tmp_path / "back" / "scmdm").rename(tmp_path / "aside")  # what the layout itself says must do
    assert main(["import", str(tmp_path / "back"), str(tmp_path / "second"), f"length={LENGTH}"]) == 0
    assert read_spec(tmp_path / "second") == read_spec(tmp_path / "ours")
    one, two = weights_of(tmp_path / "ours"), weights_of(tmp_path / "second")
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


MASK = {"mask_token_id": 3}


@pytest.mark.parametrize(
    ("layout", "kind", "changes", "stated", "shift"),
    [
        ("dream", "qwen2", {}, {"model_type": "Dream", "architectures": ["DreamModel"], **MASK}, True),
        (
            "qwen3",
            "qwen3",
            {"head_dim": 16},
            {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], **MASK},
            False,
        ),
        ("qwen2", "qwen2", {}, {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"], **MASK}, False),
        ("llama", "llama", {}, {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"], **MASK}, False),
    ],
)
def test_what_others_made_of_a_family(tmp_path, layout, kind, changes, stated, shift):
    theirs = their_model(kind, **changes)
    source = save(theirs, tmp_path / "there", **stated)
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    spec = read_spec(tmp_path / "ours")
    assert spec.model.logit_shift is shift and spec.length == LENGTH
    assert_parity(stated["model_type"], tmp_path / "ours", theirs)
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), f"format={layout}"]) == 0


def test_open_dcoder_is_qwen2_with_a_mask_and_says_nothing_of_its_shift(tmp_path, capsys):
    theirs = their_model("qwen2", rope_theta=1e6, tie_word_embeddings=True)
    source = save(theirs, tmp_path / "there", mask_token_id=3)
    assert main(["import", str(source), str(tmp_path / "no")]) == 1
    assert "logit_shift=" in capsys.readouterr().err
    assert main(["import", str(source), str(tmp_path / "ours"), "logit_shift=true"]) == 0
    assert read_spec(tmp_path / "ours").model.logit_shift and read_spec(tmp_path / "ours").mask_id == 3
    assert_parity("open-dcoder", tmp_path / "ours", theirs)


def test_llada_computes_what_llama_does(tmp_path):
    """The tensors of LLaMA under LLaDA's names."""
    theirs = their_model("llama", rope_theta=500_000.0)
    source = save(theirs, tmp_path / "there")
    llama, llada = LAYOUTS.load("llama"), LAYOUTS.load("llada")
    tensors = load_file(source / "model.safetensors")
    model = llama.architecture(
        PublishedFiles(source, json.loads((source / "config.json").read_text()), _Shapes(tensors))
    )
    names = llama.our_names(tensors, model)
    save_file({llada.published_name(ours): tensors[name] for name, ours in names.items()}, source / "model.safetensors")
    described = {
        "model_type": "llada",
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "mlp_hidden_size": 88,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-6,
        "rope": True,
        "rope_theta": 500_000.0,
        "weight_tying": False,
        "max_sequence_length": LENGTH,
        "vocab_size": len(WORDS),
        **MASK,
    }
    (source / "config.json").write_text(json.dumps(described))
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    assert_parity("llada", tmp_path / "ours", theirs)


class _Shapes:
    """The interface of tensors, of which the architecture needs the shapes."""

    def __init__(self, tensors):
        self._tensors = tensors

    def shapes(self):
        return {name: tensor.shape for name, tensor in self._tensors.items()}


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_packed_documents_have_the_angles_of_their_own_lengths(tmp_path, kind):
    """Also where the angles depend on the length: of documents shorter and longer than the pretraining."""
    scaling = YARN if kind == "yarn" else {"rope_type": "dynamic", "factor": 3.0}
    changes = {"rope_scaling": scaling, "max_position_embeddings": SHORT}
    source = save(their_model("llama", **changes), tmp_path / "there")
    assert main(["import", str(source), str(tmp_path / "ours"), f"length={LENGTH}"]) == 0
    lengths = (20, 4, 24)
    documents = torch.repeat_interleave(torch.tensor([3, 5, 6]), torch.tensor(lengths))[None]
    ids = random_ids()[:1]
    together = our_logits(tmp_path / "ours", ids, make_packing(documents))
    alone = [our_logits(tmp_path / "ours", part) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "key", "written"),
    [
        ("qwen3", "qk_norm", "llama"),
        ("qwen3", "qk_norm", "mistral"),
        ("llama: all biases", "output_bias", "qwen2"),
        ("llama: all biases", "mlp_bias", "granite"),  # can be written: no refusal
        ("granite", "embedding_multiplier", "llama"),
        ("qwen2", "attention_bias", "llama"),  # states the biases of queries and of the output together
        ("llama", "attention_bias", "qwen2"),
        ("llama: 3.1", "rotary_scaling", "llada"),
        ("mistral: wide heads", "head_width", "granite"),
        ("llama", "logit_shift", "llada"),
    ],
)
def test_a_layout_refuses_what_it_cannot_state(tmp_path, capsys, made, key, written):
    kind, changes = MODELS[made]
    assert main(["import", str(save(their_model(kind, **changes), tmp_path / "there")), str(tmp_path / "ours")]) == 0
    code = main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), f"format={written}"])
    said = capsys.readouterr().err
    if (made, written) == ("llama: all biases", "granite"):
        assert code == 0
    else:
        assert code == 1 and f"format={written}" in said and f"model.{key}" in said


FIELDS = st.text(st.characters(categories=["Ll", "Nd"], include_characters="_"), min_size=1, max_size=12)
VALUES = st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=5) | st.lists(st.integers())


@settings(max_examples=30, deadline=None)
@given(layout=st.sampled_from([name for name in LAYOUTS.names if LAYOUTS.load(name).kind == "decoder"]), data=st.data())
def test_an_unknown_field_is_refused_by_name(tmp_path_factory, layout, data):
    loaded = LAYOUTS.load(layout)
    source = _described(loaded)
    loaded.architecture(source)
    name = data.draw(FIELDS.filter(lambda text: f"{text}_x" not in source.config)) + "_x"
    changed = PublishedFiles(source.path, {**source.config, name: data.draw(VALUES)}, source.tensors)
    with pytest.raises(UserError, match=name):
        loaded.architecture(changed)


@functools.cache
def _described(layout):
    """A model that an export of this layout describes, without values of its tensors."""
    experts = {"experts": 4, "experts_per_token": 2} if layout.of_experts else {}
    model = DecoderConfig(width=32, layers=2, heads=4, mlp_width=88, **experts)
    described = layout.describe(ModelSpec(model, DiffusionConfig(), 13, 12, LENGTH), TokenIds(0, (0,), 0, 12))
    tensors = {layout.published_name(name): torch.empty(0) for name in parameter_names(model)}
    tensors[layout.published_name(EMBEDDING)] = torch.empty(13, 32)
    return PublishedFiles(Path("there"), described, _Shapes(tensors))


def _another(value):
    """A value of the same type that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 1.5 * value + (value == 0) if isinstance(value, float) else 2 * value + 1
    return {"a": 1} if isinstance(value, dict) else 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "granite"])
def test_every_field_of_the_installed_transformers_is_refused_or_honoured(tmp_path, name):
    """Change each field of the class: the import says no, or computes what `transformers` computes with it."""
    kind, changes = MODELS[name]
    theirs, ids = their_model(kind, **changes), random_ids(SHORT)
    honoured = []
    own = set(theirs.config.to_dict()) - set(PretrainedConfig().to_dict()) - set(SIZES)
    for number, field in enumerate(sorted(own)):
        value = _another(theirs.config.to_dict()[field])
        source = save(theirs, tmp_path / f"there{number}", **{field: value})
        if main(["import", str(source), str(tmp_path / f"ours{number}"), f"length={LENGTH}", "logit_shift=true"]):
            continue
        changed = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
        found, expected = our_logits(tmp_path / f"ours{number}", ids), their_logits(changed, ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=f"{field}={value}")
        honoured.append(field)
    assert {"rms_norm_eps", "rope_theta"} <= set(honoured)
