"""The table of decoders: LLaMA, Mistral, Qwen2, Qwen3, Granite, Dream, LLaDA, SDAR, and what others made of them.

A family is one entry, see `scmdm.convert.decoder_family`, and a line in `scmdm.config.layouts`. dllm's A2D models have
types of their own; Open-dCoder has Qwen2's.
"""

from __future__ import annotations

from functools import partial

from scmdm.convert.decoder_family import Family, decoder_layout, sets
from scmdm.convert.layout import EMBEDDING, FINAL_NORM, HEAD, renamed
from scmdm.convert.published_config import TRANSFORMERS_FIELDS, Allowed, any_value

TRANSFORMERS_BLOCK = {
    "norm1": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "norm_q": "self_attn.q_norm",
    "norm_k": "self_attn.k_norm",
    "attn_out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}
TRANSFORMERS_OUTER = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"}
_transformers_name = renamed(TRANSFORMERS_BLOCK, "model.layers", TRANSFORMERS_OUTER)
_llada_name = renamed(
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
    **any_value("attention_dropout", "is_llama_config", "max_position_embeddings", "pretraining_tp"),
    "attention_bias": (False,),
    "is_causal": (True, False),  # read by `decoder_family`, as `logit_shift`
    "logit_shift": (True, False),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "sliding_window": (),
    "use_mrope": (False,),
}
_WINDOWED = any_value("sliding_window", "max_window_layers")  # without effect unless use_sliding_window
_SIZES = {
    "hidden_size": sets("width"),
    "num_attention_heads": sets("heads"),
    "num_key_value_heads": sets("kv_heads", absent=None),
    "intermediate_size": sets("mlp_width"),
    "rms_norm_eps": sets("norm_eps", absent=1e-6),
    "tie_word_embeddings": sets("tied", absent=False),
}
_HEAD_WIDTH = {"head_dim": sets("head_width", absent=None)}
_BIASES = {
    "attention_bias": sets("attention_bias", "output_bias", absent=False),
    "mlp_bias": sets("mlp_bias", absent=False),
}

_TRANSFORMERS = partial(Family, published_name=_transformers_name, harmless=_HARMLESS)

LLAMA = decoder_layout(
    _TRANSFORMERS(
        "llama",
        "LlamaForCausalLM",
        ("llama", "a2d-llama"),
        fields=_SIZES | _HEAD_WIDTH | _BIASES,
        expected={"hidden_act": "silu"},
    )
)
MISTRAL = decoder_layout(
    _TRANSFORMERS(
        "mistral",
        "MistralForCausalLM",
        ("mistral",),
        fields=_SIZES | _HEAD_WIDTH,
        expected={"hidden_act": "silu", "sliding_window": None},
        stated=("sliding_window",),
    )
)
QWEN2 = decoder_layout(
    _TRANSFORMERS(
        "qwen2",
        "Qwen2ForCausalLM",
        ("qwen2", "a2d-qwen2"),
        fields=_SIZES | _HEAD_WIDTH,
        keys={"attention_bias": True},
        expected={"hidden_act": "silu", "use_sliding_window": False},
        harmless=_HARMLESS | _WINDOWED | any_value("attention_bias"),
    )
)
_qwen3 = partial(
    _TRANSFORMERS,
    fields=_SIZES
    | {
        "head_dim": sets("head_width", absent=128),
        "attention_bias": sets("attention_bias", "output_bias", absent=False),
    },
    keys={"qk_norm": True},
    expected={"hidden_act": "silu", "use_sliding_window": False},
)
QWEN3 = decoder_layout(
    _qwen3("qwen3", "Qwen3ForCausalLM", ("qwen3", "a2d-qwen3"), harmless=_HARMLESS | _WINDOWED),
)
SDAR = decoder_layout(
    _qwen3(
        "sdar",
        "SDARForCausalLM",
        ("sdar",),
        harmless=_HARMLESS | _WINDOWED | any_value("fuse_cross_entropy") | {"logit_shift": (False,)},
        written={"fuse_cross_entropy": False},  # the original code has no default
        shifted=False,
        block_field="block_size",
        of_blocks=True,
    )
)
GRANITE = decoder_layout(
    _TRANSFORMERS(
        "granite",
        "GraniteForCausalLM",
        ("granite",),
        fields=_SIZES
        | _BIASES
        | {
            "embedding_multiplier": sets("embedding_multiplier", absent=1.0),
            "attention_multiplier": sets("attention_multiplier", absent=1.0),
            "residual_multiplier": sets("residual_multiplier", absent=1.0),
            "logits_scaling": sets("logits_divisor", absent=1.0),
        },
        expected={"hidden_act": "silu"},
    )
)
DREAM = decoder_layout(
    _TRANSFORMERS(
        "dream",
        "DreamModel",
        ("Dream", "dream"),
        fields=_SIZES,
        keys={"attention_bias": True},
        expected={"hidden_act": "silu", "use_sliding_window": False},
        harmless=_HARMLESS | _WINDOWED | any_value("attention_bias"),
        shifted=True,
        block_field=None,
    )
)
LLADA = decoder_layout(
    Family(
        "llada",
        "LLaDAModelLM",
        ("llada",),
        fields={
            "d_model": sets("width"),
            "n_heads": sets("heads"),
            "n_kv_heads": sets("kv_heads", absent=None),
            "mlp_ratio": sets("mlp_ratio", absent=4),
            "mlp_hidden_size": sets("mlp_width", absent=None),
            "rms_norm_eps": sets("norm_eps", absent=1e-5),
            "rope_theta": sets("rotary_base", absent=10_000.0),
            "include_qkv_bias": sets("attention_bias", absent=False),
            "weight_tying": sets("tied", absent=True),
            "residual_dropout": sets("dropout", absent=0.1),
        },
        # All fields are stated, because the original code's defaults are those of another model.
        expected={
            "activation_type": "silu",
            "block_type": "llama",
            "layer_norm_type": "rms",
            "rope": True,
            "alibi": False,
            "attention_layer_norm": False,
            "bias_for_layer_norm": False,
            "include_bias": False,
            "input_emb_norm": False,
            "layer_norm_with_affine": True,
            "scale_logits": False,
        },
        stated=("activation_type", "block_type", "layer_norm_type", "rope"),
        harmless={
            **TRANSFORMERS_FIELDS,
            **any_value("alibi_bias_max", "attention_dropout", "attention_layer_norm_with_affine", "block_group_size"),
            **any_value("embedding_dropout", "embedding_size", "flash_attention", "precision", "rope_full_precision"),
            **any_value("init_cutoff_factor", "init_device", "init_fn", "init_std"),
            **any_value("max_sequence_length", "train_max_sequence_length"),
            "multi_query_attention": (False,),
        },
        written={"attention_dropout": 0.0, "embedding_dropout": 0.0},
        rows=("vocab_size", "embedding_size"),
        published_name=_llada_name,
        own_names=True,
        layers="n_layers",
        length="max_sequence_length",
        scaled=False,
        shifted=False,
        block_field=None,
    )
)
