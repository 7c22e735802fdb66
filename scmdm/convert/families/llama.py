"""Decoders with the tensor names of `transformers`' LLaMA: LLaMA, Qwen2, and Dream, which was trained from Qwen2.5.

LLaMA and Qwen2 predict the next token, and Dream kept that shift by one position; models that dllm converted from LLaMA
and Qwen2 (A2D) did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from scmdm.config.model import ModelConfig
from scmdm.convert.layout import EMBEDDING, FINAL_NORM, HEAD, PublishedLayout, TokenIds, renamed
from scmdm.convert.published_config import (
    TRANSFORMERS_FIELDS,
    Allowed,
    PublishedConfig,
    any_value,
    count_blocks,
    validated,
)
from scmdm.convert.published_files import PublishedFiles
from scmdm.convert.published_rotary import describe_rotary, read_rotary
from scmdm.models.decoder import DecoderConfig
from scmdm.models.model_files import ModelSpec

_CAUSAL = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_CONVERTED = "a2d-"  # prefix of dllm's types

_published_name = renamed(
    {
        "norm1": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "mlp_gate": "mlp.gate_proj",
        "mlp_up": "mlp.up_proj",
        "mlp_down": "mlp.down_proj",
    },
    "model.layers",
    {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"},
)


_HARMLESS: dict[str, Allowed] = {
    **TRANSFORMERS_FIELDS,
    **any_value("attention_bias", "attention_dropout", "is_llama_config", "max_position_embeddings"),
    **any_value("pretraining_tp", "is_causal", "logit_shift"),  # the last two: see `_shift`
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "use_mrope": (False,),
}
_WINDOWED = any_value("sliding_window", "max_window_layers")  # without effect unless use_sliding_window


@dataclass(frozen=True)
class _Member:
    """A member of the family.

    Attributes:
        name: Value of the key `format`.
        model_type: What an export names.
        architecture: Class of the original code.
        others: Types of models that compute the same.
        biased: Whether queries, keys and values have biases; None: as the tensors say.
        harmless: Fields that change nothing.
        shifted: The only `logit_shift` that programs of this layout support; None: both.
    """

    name: str
    model_type: str
    architecture: str
    others: tuple[str, ...] = ()
    biased: bool | None = None
    harmless: Mapping[str, Allowed] = field(default_factory=lambda: _HARMLESS)
    shifted: bool | None = None


def _architecture(member: _Member, source: PublishedFiles) -> DecoderConfig:
    config = PublishedConfig(source)
    config.expect("model_type", member.model_type, *member.others)
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    config.expect("num_hidden_layers", layers := count_blocks(source, r"model\.layers\.(\d{1,6})\."))
    if source.config.get("model_type") == "mistral" and "sliding_window" not in source.config:
        raise config.refusal("sliding_window", 4096, "this is its default, and scmdm has no sliding windows")
    if member.biased is False:  # with true, the projection of the output has a bias, too
        config.expect("attention_bias", False)
    config.expect("layer_types", ["full_attention"] * layers)
    heads, width = config.integer("num_attention_heads", high=4096), config.integer("hidden_size", high=2**20)
    head_width = config.integer("head_dim", max(1, width // heads), high=2**16)
    has_biases = "model.layers.0.self_attn.q_proj.bias" in source.tensors.shapes()
    model = DecoderConfig(
        width=width,
        layers=layers,
        heads=heads,
        head_width=None if head_width * heads == width else head_width,
        kv_heads=config.integer("num_key_value_heads", heads),
        mlp_width=config.integer("intermediate_size", high=2**24),
        norm_eps=config.number("rms_norm_eps", 1e-6, 0, 1),
        attention_bias=has_biases if member.biased is None else member.biased,
        tied=config.flag("tie_word_embeddings"),
        **read_rotary(config, source),
    )
    config.refuse_unknown(member.harmless)
    return validated(model, source)


def _shift(member: _Member, source: PublishedFiles, has_mask: bool) -> bool | None:
    """Return whether a position is predicted from the one before it; None if the files do not say.

    Exports of scmdm state it. Dream kept the shift of its autoregressive base, dllm's A2D models did not. A causal
    class of `transformers` predicts the next token, unless there is a sign that the model was trained further.
    """
    stated, kind = source.config.get("logit_shift"), str(source.config.get("model_type")).lower()
    if isinstance(stated, bool):
        return stated
    if kind.startswith(_CONVERTED):
        return False
    architectures = source.config.get("architectures")
    if member.shifted is not None:
        return member.shifted if architectures in (None, [member.architecture]) else None
    causal = isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in _CAUSAL
    trained_further = has_mask or source.config.get("auto_map") or source.config.get("is_causal") is False
    return True if causal and not trained_further else None


def _describe(member: _Member, spec: ModelSpec, ids: TokenIds) -> dict[str, Any]:
    config = spec.model
    assert isinstance(config, DecoderConfig)
    return {
        "architectures": [member.architecture],
        "model_type": member.model_type,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        **({} if config.attention_width == config.width else {"head_dim": config.head_dim}),
        "num_key_value_heads": config.kv_heads or config.heads,
        "intermediate_size": config.inner_width,
        "hidden_act": "silu",
        **describe_rotary(config),
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": spec.length,
        "vocab_size": spec.vocab_size,
        **ids.as_fields(),
        **({"logit_shift": config.logit_shift} if member.shifted is None else {}),
    }


def _causal_note(config: ModelConfig) -> str:
    shift = ", and a position is predicted from the one before it" if config.logit_shift else ""
    return "`transformers` loads the weights as a causal model, but attention must be bidirectional" + shift + "."


def _unsupported(member: _Member, config: ModelConfig) -> str | None:
    assert isinstance(config, DecoderConfig)
    if bool(member.biased is not False) != config.attention_bias:
        given = str(config.attention_bias).lower()
        expected = "has no" if member.biased is False else "has"
        return f"it {expected} biases of queries, keys and values, but the model has model.attention_bias={given}"
    if member.shifted is not None and config.logit_shift != member.shifted:
        return "it predicts each token at the position before it, but the model has model.logit_shift=false"
    return None


def _layout(member: _Member) -> PublishedLayout:
    kinds = {kind.lower() for kind in (member.model_type, *member.others)}

    def recognises(source: PublishedFiles) -> bool:
        named = _published_name(EMBEDDING) in source.tensors.shapes()
        return named and str(source.config.get("model_type")).lower() in kinds

    return PublishedLayout(
        name=member.name,
        kind="decoder",
        published_name=_published_name,
        recognises=recognises,
        architecture=partial(_architecture, member),
        describe=partial(_describe, member),
        unsupported=partial(_unsupported, member),
        logit_shift=partial(_shift, member),
        lengths=("max_position_embeddings",),
        derived=("rotary_emb.inv_freq",),
        card_note=_causal_note if member.shifted is None else lambda _: "",
    )


DREAM = _layout(_Member("dream", "Dream", "DreamModel", ("dream",), harmless=_HARMLESS | _WINDOWED, shifted=True))
LLAMA = _layout(_Member("llama", "llama", "LlamaForCausalLM", ("a2d-llama", "mistral"), biased=False))
QWEN2 = _layout(
    _Member("qwen2", "qwen2", "Qwen2ForCausalLM", ("a2d-qwen2",), biased=True, harmless=_HARMLESS | _WINDOWED)
)
