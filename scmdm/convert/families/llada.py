"""LLaDA (GSAI-ML/LLaDA-8B-Base and -Instruct)."""

from __future__ import annotations

from typing import Any

from scmdm.config.model import ModelConfig
from scmdm.convert.layout import EMBEDDING, FINAL_NORM, HEAD, PublishedLayout, TokenIds, renamed
from scmdm.convert.published_config import (
    TRANSFORMERS_FIELDS,
    Allowed,
    PublishedConfig,
    any_value,
    count_blocks,
    matrix_shape,
    validated,
)
from scmdm.convert.published_files import PublishedFiles
from scmdm.models.decoder import DecoderConfig
from scmdm.models.model_files import ModelSpec

_published_name = renamed(
    {
        "norm1": "attn_norm",
        "attn_q": "q_proj",
        "attn_k": "k_proj",
        "attn_v": "v_proj",
        "attn_out": "attn_out",
        "norm2": "ff_norm",
        "mlp_gate": "ff_proj",
        "mlp_up": "up_proj",
        "mlp_down": "ff_out",
    },
    "model.transformer.blocks",
    {
        EMBEDDING: "model.transformer.wte.weight",
        FINAL_NORM: "model.transformer.ln_f.weight",
        HEAD: "model.transformer.ff_out.weight",
    },
)
_HARMLESS: dict[str, Allowed] = {
    **TRANSFORMERS_FIELDS,
    **any_value("alibi_bias_max", "attention_dropout", "attention_layer_norm_with_affine", "block_group_size"),
    **any_value("embedding_dropout", "embedding_size", "flash_attention", "mlp_ratio", "precision"),
    **any_value("init_cutoff_factor", "init_device", "init_fn", "init_std"),
    **any_value("max_sequence_length", "rope_full_precision", "train_max_sequence_length"),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False,),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (False,),
    "scale_logits": (False,),
}


def _recognises(source: PublishedFiles) -> bool:
    return _published_name(EMBEDDING) in source.tensors.shapes()


def _architecture(source: PublishedFiles) -> DecoderConfig:
    config = PublishedConfig(source)
    config.expect("model_type", "llada")
    config.expect("activation_type", "silu", absent="swiglu")
    config.expect("layer_norm_type", "rms", absent="default")
    config.expect("block_type", "llama", absent="sequential")
    config.expect("rope", True, absent=False)
    config.expect("n_layers", layers := count_blocks(source, r"model\.transformer\.blocks\.(\d{1,6})\."))
    heads, width = config.integer("n_heads", high=4096), config.integer("d_model", high=2**20)
    gate = matrix_shape(source, "model.transformer.blocks.0.ff_proj.weight")
    model = DecoderConfig(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=config.integer("n_kv_heads", heads),
        mlp_width=config.integer("mlp_hidden_size", gate[0], high=2**24),
        rotary_base=config.number("rope_theta", 10_000.0, 1, 1e12),
        norm_eps=config.number("rms_norm_eps", 1e-5, 0, 1),
        attention_bias=config.flag("include_qkv_bias"),
        tied=config.flag("weight_tying", default=True),
        dropout=config.number("residual_dropout", 0.1, 0, 0.99),
    )
    config.refuse_unknown(_HARMLESS)
    return validated(model, source)


def _describe(spec: ModelSpec, ids: TokenIds) -> dict[str, Any]:
    """Write all fields: the defaults of the original code are those of another model."""
    config = spec.model
    assert isinstance(config, DecoderConfig)
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads or config.heads,
        "mlp_ratio": config.mlp_ratio,
        "mlp_hidden_size": config.inner_width,
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "input_emb_norm": False,
        "rms_norm_eps": config.norm_eps,
        "alibi": False,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": config.rotary_base,
        "flash_attention": False,
        "multi_query_attention": None,
        "include_bias": False,
        "include_qkv_bias": config.attention_bias,
        "scale_logits": False,
        "weight_tying": config.tied,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": config.dropout or 0.0,
        "max_sequence_length": spec.length,
        "vocab_size": spec.vocab_size,
        "embedding_size": spec.vocab_size,
        **ids.as_fields(),
    }


def _unsupported(config: ModelConfig) -> str | None:
    assert isinstance(config, DecoderConfig)
    if config.rotary_scaling != "none":
        return f"it does not scale rotary angles, but the model has model.rotary_scaling={config.rotary_scaling}"
    if config.logit_shift:
        return "it predicts the token at each position itself, but the model has model.logit_shift=true"
    if config.attention_width != config.width:
        return f"its head width is model.width / model.heads, but the model has model.head_width={config.head_width}"
    return None


LLADA = PublishedLayout(
    name="llada",
    kind="decoder",
    published_name=_published_name,
    recognises=_recognises,
    architecture=_architecture,
    describe=_describe,
    unsupported=_unsupported,
    lengths=("max_sequence_length",),
)
