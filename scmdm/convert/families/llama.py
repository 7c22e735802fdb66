"""Decoders with the tensor names of `transformers`' LLaMA: LLaMA, Qwen2, and Dream, which was trained from Qwen2.5.

All of them shift logits by one position: LLaMA and Qwen2 predict the next token, and Dream kept the shift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scmdm.config.model import ModelConfig
from scmdm.convert.layout import EMBEDDING, FINAL_NORM, HEAD, PublishedLayout, renamed
from scmdm.convert.published_config import PublishedConfig, count_blocks
from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError
from scmdm.models.decoder import DecoderConfig

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


def _architecture(source: PublishedFiles) -> DecoderConfig:
    config = PublishedConfig(source)
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    config.expect("mlp_bias", False)
    scaling = source.config.get("rope_scaling")
    if scaling is not None and (not isinstance(scaling, dict) or scaling.get("rope_type", "default") != "default"):
        raise UserError(f"{source.path}: rope_scaling={scaling!r} in its configuration, which scmdm does not implement")
    config.expect("num_hidden_layers", layers := count_blocks(source, r"model\.layers\.(\d{1,6})\."))
    heads, width = config.integer("num_attention_heads", high=4096), config.integer("hidden_size", high=2**20)
    head_width = config.integer("head_dim", max(1, width // heads), high=2**16)
    model = DecoderConfig(
        width=width,
        layers=layers,
        heads=heads,
        head_width=None if head_width * heads == width else head_width,
        kv_heads=config.integer("num_key_value_heads", heads),
        mlp_width=config.integer("intermediate_size", high=2**24),
        rotary_base=config.number("rope_theta", 10_000.0, 1, 1e12),
        norm_eps=config.number("rms_norm_eps", 1e-6, 0, 1),
        attention_bias="model.layers.0.self_attn.q_proj.bias" in source.tensors.shapes(),
        tied=config.flag("tie_word_embeddings"),
        logit_shift=True,
    )
    model.validate()
    return model


def _description(model_type: str, architecture: str) -> Callable[[ModelConfig, int, int, int], dict[str, Any]]:
    def describe(config: ModelConfig, vocab_size: int, mask_id: int, length: int) -> dict[str, Any]:
        assert isinstance(config, DecoderConfig)
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            **({} if config.attention_width == config.width else {"head_dim": config.head_dim}),
            "num_key_value_heads": config.kv_heads or config.heads,
            "intermediate_size": config.inner_width,
            "hidden_act": "silu",
            "rope_theta": config.rotary_base,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied,
            "max_position_embeddings": length,
            "vocab_size": vocab_size,
            "mask_token_id": mask_id,
        }

    return describe


def _causal_note(config: ModelConfig) -> str:
    shift = ", and a position is predicted from the one before it" if config.logit_shift else ""
    return "`transformers` loads the weights as a causal model, but attention must be bidirectional" + shift + "."


def _layout(model_type: str, architecture: str, *, biased: bool, shifted: bool | None = None) -> PublishedLayout:
    """Make a layout of this family. `shifted` is the only `logit_shift` that its programs support; None: both."""
    name = model_type.lower()

    def recognises(source: PublishedFiles) -> bool:
        named = _published_name(EMBEDDING) in source.tensors.shapes()
        return named and str(source.config.get("model_type")).lower() == name

    def unsupported(config: ModelConfig) -> str | None:
        assert isinstance(config, DecoderConfig)
        if biased != config.attention_bias:
            given = str(config.attention_bias).lower()
            expected = "has" if biased else "has no"
            return f"it {expected} biases of queries, keys and values, but the model has model.attention_bias={given}"
        if shifted is not None and config.logit_shift != shifted:
            return "it predicts each token at the position before it, but the model has model.logit_shift=false"
        return None

    return PublishedLayout(
        name=name,
        kind="decoder",
        published_name=_published_name,
        recognises=recognises,
        architecture=_architecture,
        describe=_description(model_type, architecture),
        unsupported=unsupported,
        derived=("rotary_emb.inv_freq",),
        card_note=_causal_note if shifted is None else lambda _: "",
    )


DREAM = _layout("Dream", "DreamModel", biased=True, shifted=True)
LLAMA = _layout("llama", "LlamaForCausalLM", biased=False)
QWEN2 = _layout("qwen2", "Qwen2ForCausalLM", biased=True)
