"""The table of decoders with experts: LLaDA-MoE and LLaDA2. A family is one entry (`decoder_family`)."""

from __future__ import annotations

from scmdm.convert.decoder_family import Family, decoder_layout, sets
from scmdm.convert.families.decoders import TRANSFORMERS_BLOCK, TRANSFORMERS_OUTER
from scmdm.convert.layout import EMBEDDING, renamed
from scmdm.convert.published_config import TRANSFORMERS_FIELDS, any_value
from scmdm.models.decoder_config import DecoderConfig

_EXPERTS = {
    "experts.router": "mlp.gate",
    "experts.router.balance": "mlp.gate",
    "experts.gate": "mlp.experts.*.gate_proj",
    "experts.up": "mlp.experts.*.up_proj",
    "experts.down": "mlp.experts.*.down_proj",
    "experts.shared_gate": "mlp.shared_experts.gate_proj",
    "experts.shared_up": "mlp.shared_experts.up_proj",
    "experts.shared_down": "mlp.shared_experts.down_proj",
}
_llada_moe_name = renamed(TRANSFORMERS_BLOCK | _EXPERTS, "model.layers", TRANSFORMERS_OUTER)
_llada2_name = renamed(
    TRANSFORMERS_BLOCK
    | _EXPERTS
    | {
        "attn_q": "attention.query_key_value.q",
        "attn_k": "attention.query_key_value.k",
        "attn_v": "attention.query_key_value.v",
        "norm_q": "attention.query_layernorm",
        "norm_k": "attention.key_layernorm",
        "attn_out": "attention.dense",
    },
    "model.layers",
    TRANSFORMERS_OUTER | {EMBEDDING: "model.word_embeddings.weight"},
)
_SIZES = {
    "hidden_size": sets("width"),
    "num_attention_heads": sets("heads"),
    "num_key_value_heads": sets("kv_heads", absent=None),
    "rms_norm_eps": sets("norm_eps", absent=1e-5),
    "tie_word_embeddings": sets("tied", absent=False),
    "num_experts": sets("experts"),
    "num_experts_per_tok": sets("experts_per_token"),
}
_HARMLESS = {
    **TRANSFORMERS_FIELDS,
    **any_value("attention_dropout", "max_position_embeddings", "pretraining_tp", "output_router_logits"),
    **any_value("router_aux_loss_coef"),  # of the training: model.router_loss
}


def _several(config: DecoderConfig) -> str | None:
    """LLaDA2's code does not renormalise the weight of a single expert."""
    if config.experts_per_token < 2:
        return f"its models have at least 2 experts per token, but this one has {config.experts_per_token}"
    return None


LLADA_MOE = decoder_layout(
    Family(
        "llada_moe",
        "LLaDAMoEModelLM",
        ("llada",),
        fields=_SIZES
        | {
            "dense_intermediate_size": sets("mlp_width"),
            "expert_intermediate_size": sets("expert_width"),
            "attention_bias": sets("attention_bias", "output_bias", absent=False),
            "qk_layernorm": sets("qk_norm", absent=False),
            "partial_rotary_factor": sets("rotary_fraction"),
        },
        keys={"router": "softmax", "router_renormalise": False},
        expected={
            "hidden_act": "silu",
            "clip_qkv": None,
            "moe_router_enable_expert_bias": False,
            "moe_router_score_function": "softmax",
            "routed_scaling_factor": 1,
            "shared_expert_intermediate_size": None,
        },
        harmless=_HARMLESS
        | {
            "norm_topk_prob": (False,),
            # The original code does not read them.
            **any_value("router_num_group", "router_topk_group"),
        },
        published_name=_llada_moe_name,
        shifted=False,
        block_field=None,
        expert_flags="moe_layer_freq",
        of_experts=True,
    )
)
LLADA2 = decoder_layout(
    Family(
        "llada2",
        "LLaDA2MoeModelLM",
        ("llada2_moe",),
        fields=_SIZES
        | {
            "head_dim": sets("head_width", absent=None),
            "intermediate_size": sets("mlp_width"),
            "moe_intermediate_size": sets("expert_width"),
            "num_shared_experts": sets("shared_experts", absent=0),
            "first_k_dense_replace": sets("dense_layers", absent=0),
            "n_group": sets("router_groups"),
            "topk_group": sets("router_top_groups"),
            "routed_scaling_factor": sets("router_scale"),
            "use_qkv_bias": sets("attention_bias", absent=False),
            "use_bias": sets("output_bias", absent=True),
            "partial_rotary_factor": sets("rotary_fraction", absent=0.5),
        },
        keys={"qk_norm": True, "router": "sigmoid", "router_bias": True, "router_renormalise": True},
        expected={
            "hidden_act": "silu",
            "norm_head": False,
            "norm_topk_prob": True,
            "score_function": "sigmoid",
            "use_qk_norm": True,
            "use_sliding_window": False,
        },
        harmless=_HARMLESS
        | any_value("embedding_dropout", "output_dropout", "router_dtype", "sliding_window", "max_window_layers")
        | any_value("rotary_dim")  # the original code computes it from partial_rotary_factor
        | {"moe_router_enable_expert_bias": (True,)},
        published_name=_llada2_name,
        shifted=False,
        of_blocks=True,
        of_experts=True,
        impossible=_several,
    )
)
