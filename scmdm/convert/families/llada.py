"""LLaDA (GSAI-ML/LLaDA-8B-Base and -Instruct)."""

from __future__ import annotations

from typing import Any

from scmdm.config.model import ModelConfig
from scmdm.convert.layout import EMBEDDING, FINAL_NORM, HEAD, PublishedLayout, renamed
from scmdm.convert.published_config import PublishedConfig, count_blocks, matrix_shape
from scmdm.convert.published_files import PublishedFiles
from scmdm.models.decoder import DecoderConfig

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
_UNIMPLEMENTED = (
    "alibi",
    "include_bias",
    "attention_layer_norm",
    "input_emb_norm",
    "scale_logits",
    "multi_query_attention",
)


def _recognises(source: PublishedFiles) -> bool:
    return _published_name(EMBEDDING) in source.tensors.shapes()


def _architecture(source: PublishedFiles) -> DecoderConfig:
    config = PublishedConfig(source)
    config.expect("activation_type", "silu")
    config.expect("layer_norm_type", "rms")
    config.expect("block_type", "llama")
    config.expect("rope", True)
    for key in _UNIMPLEMENTED:
        config.expect(key, False)
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
        tied=config.flag("weight_tying"),
    )
    model.validate()
    return model


def _describe(config: ModelConfig, vocab_size: int, mask_id: int, length: int) -> dict[str, Any]:
    assert isinstance(config, DecoderConfig)
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads or config.heads,
        "mlp_hidden_size": config.inner_width,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": config.norm_eps,
        "rope": True,
        "rope_theta": config.rotary_base,
        "include_bias": False,
        "include_qkv_bias": config.attention_bias,
        "weight_tying": config.tied,
        "max_sequence_length": length,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "mask_token_id": mask_id,
    }


def _unsupported(config: ModelConfig) -> str | None:
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
)
