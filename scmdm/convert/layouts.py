"""Published layouts: what they call our tensors, and what their `config.json` says of the architecture.

`mdlm` is the DiT of kuleshov-group/mdlm, which UDLM (kuleshov-group/discrete-diffusion-guidance) and Duo (s-sahoo/duo)
share; `llada` GSAI-ML/LLaDA-8B's; `llama`, `qwen2` and `dream` are named as `transformers` names LLaMA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.model import LlamaConfig, ModelConfig
from scmdm.convert.published_files import Source
from scmdm.errors import UserError
from scmdm.models.model_files import ModelSpec

_MDLM = "backbone."
_HF_BLOCK = {
    "norm1": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}
_LLADA_BLOCK = {
    "norm1": "attn_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_out": "attn_out",
    "norm2": "ff_norm",
    "mlp_gate": "ff_proj",
    "mlp_up": "up_proj",
    "mlp_down": "ff_out",
}
EMBEDDING, HEAD, HEAD_BIAS = "vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"
_NORM = "output_layer.norm_final.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """One way to name and describe a model."""

    name: str
    kind: str  # of ModelConfig
    theirs: Callable[[str], str]  # their name of a tensor of ours
    architecture: Callable[[Source], ModelConfig]
    describe: Callable[[ModelConfig, int, int, int], dict[str, Any]]  # config.json, given vocabulary, mask and length
    derived: tuple[str, ...] = ()  # endings of names of tensors that we compute

    def ours(self, names: Iterable[str], config: ModelConfig) -> dict[str, str]:
        """Our name of each of their tensors; of one that we do not know their own. Derived ones are left out."""
        kept = [name for name in names if not name.endswith(self.derived or ("\n",))]
        if config.llama.tied:
            kept = [name for name in kept if name != self.theirs(HEAD)]  # a copy of the embedding
        known = {self.theirs(ours): ours for ours in _our_names(config)}
        return {name: known.get(name, name) for name in kept}


def _our_names(config: ModelConfig) -> list[str]:
    """Names of the parameters without conditioner."""
    model = ModelSpec(config, DiffusionConfig(), 2, 1, 2).build()
    return [name for name, _ in model.named_parameters() if not name.startswith("conditioner.")]


def _mdlm_name(ours: str) -> str:
    return _MDLM + ours


def _llama_name(block: Mapping[str, str], blocks: str, outer: Mapping[str, str]) -> Callable[[str], str]:
    def theirs(ours: str) -> str:
        if (match := _BLOCK.match(ours)) is None:
            return outer[ours]
        part, _, kind = ours[match.end() :].partition(".")
        return f"{blocks}.{match[1]}.{block[part]}.{kind}"

    return theirs


def _count_blocks(source: Source, pattern: str) -> int:
    """How many blocks the names have."""
    numbers = {int(found[1]) for name in source.tensors.shapes() if (found := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise UserError(f"{source.path} has no blocks numbered 0, 1, 2, ... ({pattern}); it is not whole, or no model")
    return len(numbers)


def _shape(source: Source, name: str, dimensions: int = 2) -> torch.Size:
    shape = source.tensors.shapes().get(name)
    if shape is None or len(shape) != dimensions or 0 in shape:
        found = "does not have" if shape is None else f"has with shape {tuple(shape)}"
        raise UserError(
            f"{name}, a tensor of {dimensions} dimensions, is what {source.path} {found}; download it again"
        )
    return shape


class _Config:
    """Numbers of a configuration that need not be trusted."""

    def __init__(self, source: Source) -> None:
        self._path, self._content = source.path, source.config

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        value = self._content.get(key, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise UserError(
                f"{self._path}: {key}={value!r} in its configuration; expected a number from {low} to {high}"
            )
        return value

    def integer(self, key: str, default: int | None = None, high: int = 2**31) -> int:
        return int(self.number(key, default, 1, high))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._content.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self._path}: {key}={value!r} in its configuration; expected true or false")
        return value

    def expect(self, key: str, *possible: object) -> None:
        """Refuse what would compute something else; an absent key is fine."""
        value = self._content.get(key)
        if value is not None and value not in possible:
            names = ", ".join(map(repr, possible))
            raise UserError(f"{self._path}: {key}={value!r} in its configuration; scmdm's model has only {names}")


def _mdlm_architecture(source: Source) -> ModelConfig:
    """From the shapes; the configuration (of the hub or of hyper-parameters) knows heads, dropout and time."""
    saved = source.config.get("model")
    flat = {**source.config, **(saved if isinstance(saved, dict) else {})}
    config = _Config(Source(source.path, flat, source.tensors))
    config.expect("parameterization", "subs", "d3pm")
    config.expect("backbone", "dit")
    _refuse_relatives(source)
    width = _shape(source, _MDLM + EMBEDDING)[1]
    table = source.tensors.shapes().get(f"{_MDLM}rotary_emb.inv_freq")
    heads = config.integer("n_heads", width // (2 * table[0]) if table is not None and len(table) == 1 else None)
    if width % (2 * heads):
        raise UserError(f"{source.path}: n_heads={heads} does not divide the width {width} into pairs")
    return ModelConfig(
        kind="dit",
        width=width,
        layers=_count_blocks(source, rf"{re.escape(_MDLM)}blocks\.(\d{{1,6}})\."),
        heads=heads,
        condition_width=_shape(source, f"{_MDLM}sigma_map.mlp.2.weight")[0],
        mlp_ratio=max(1, _shape(source, f"{_MDLM}blocks.0.mlp.0.weight")[0] // width),
        time_conditioning=config.flag("time_conditioning"),
        dropout=config.number("dropout", 0.0, 0, 0.99),
    )


def _refuse_relatives(source: Source) -> None:
    names = source.tensors.shapes()
    if any(name.startswith(f"{_MDLM}cond_map.") for name in names):
        raise UserError(f"{source.path} is conditioned on classes (cond_map), which scmdm does not import")
    if f"{_MDLM}sigma_map.mlp.0.weight" not in names and any(name.startswith(_MDLM) for name in names):
        raise UserError(
            f"{source.path} has no sigma_map: it is a causal model, or not MDLM's DiT; give a bidirectional one"
        )


def _mdlm_config(config: ModelConfig, vocab_size: int, mask_id: int, length: int) -> dict[str, Any]:
    return {
        "architectures": ["MDLM"],
        "model_type": "mdlm",
        "hidden_dim": config.width,
        "n_blocks": config.layers,
        "n_heads": config.heads,
        "cond_dim": config.condition_width,
        "dropout": config.dropout or 0.0,
        "model_length": length,
        "time_conditioning": config.time_conditioning,
        "vocab_size": vocab_size,
    }


def _hf_architecture(source: Source, *, shift: bool) -> ModelConfig:
    config = _Config(source)
    config.expect("hidden_act", "silu")
    config.expect("use_sliding_window", False)
    config.expect("mlp_bias", False)
    if (scaling := source.config.get("rope_scaling")) is not None and scaling.get("rope_type", "default") != "default":
        raise UserError(f"{source.path}: rope_scaling={scaling!r} in its configuration, which scmdm does not compute")
    heads, width = config.integer("num_attention_heads", high=4096), config.integer("hidden_size", high=2**20)
    config.expect("head_dim", width // heads)
    biased = "model.layers.0.self_attn.q_proj.bias" in source.tensors.shapes()
    return _llama_config(
        source,
        layers=_count_blocks(source, r"model\.layers\.(\d{1,6})\."),
        listed=config.integer("num_hidden_layers"),
        width=width,
        heads=heads,
        llama=LlamaConfig(
            kv_heads=config.integer("num_key_value_heads", heads),
            mlp_width=config.integer("intermediate_size", high=2**24),
            rotary_base=config.number("rope_theta", 10_000.0, 1, 1e12),
            norm_eps=config.number("rms_norm_eps", 1e-6, 0, 1),
            attention_bias=biased,
            tied=config.flag("tie_word_embeddings"),
            logit_shift=shift,
        ),
    )


def _llama_config(
    source: Source, *, layers: int, listed: int, width: int, heads: int, llama: LlamaConfig
) -> ModelConfig:
    if layers != listed:
        raise UserError(f"{source.path} has {layers} blocks, its configuration says {listed}; it is not whole")
    if width % (2 * heads) or heads % (llama.kv_heads or heads):
        raise UserError(
            f"{source.path}: {heads} heads and {llama.kv_heads} of keys do not divide width {width} and them"
        )
    return ModelConfig(kind="llama", width=width, layers=layers, heads=heads, llama=llama)


def _hf_config(name: str, architecture: str) -> Callable[[ModelConfig, int, int, int], dict[str, Any]]:
    def describe(config: ModelConfig, vocab_size: int, mask_id: int, length: int) -> dict[str, Any]:
        own = config.llama
        return {
            "architectures": [architecture],
            "model_type": name,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": own.kv_heads or config.heads,
            "intermediate_size": config.mlp_width,
            "hidden_act": "silu",
            "rope_theta": own.rotary_base,
            "rms_norm_eps": own.norm_eps,
            "tie_word_embeddings": own.tied,
            "max_position_embeddings": length,
            "vocab_size": vocab_size,
            "mask_token_id": mask_id,
        }

    return describe


def _llada_architecture(source: Source) -> ModelConfig:
    config = _Config(source)
    config.expect("activation_type", "silu")
    config.expect("layer_norm_type", "rms")
    config.expect("block_type", "llama")
    config.expect("rope", True)
    for flag in (
        "alibi",
        "include_bias",
        "attention_layer_norm",
        "input_emb_norm",
        "scale_logits",
        "multi_query_attention",
    ):
        config.expect(flag, False)
    heads, width = config.integer("n_heads", high=4096), config.integer("d_model", high=2**20)
    gate = _shape(source, "model.transformer.blocks.0.ff_proj.weight")
    return _llama_config(
        source,
        layers=_count_blocks(source, r"model\.transformer\.blocks\.(\d{1,6})\."),
        listed=config.integer("n_layers"),
        width=width,
        heads=heads,
        llama=LlamaConfig(
            kv_heads=config.integer("n_kv_heads", heads),
            mlp_width=config.integer("mlp_hidden_size", gate[0], high=2**24),
            rotary_base=config.number("rope_theta", 10_000.0, 1, 1e12),
            norm_eps=config.number("rms_norm_eps", 1e-5, 0, 1),
            attention_bias=config.flag("include_qkv_bias"),
            tied=config.flag("weight_tying"),
        ),
    )


def _llada_config(config: ModelConfig, vocab_size: int, mask_id: int, length: int) -> dict[str, Any]:
    own = config.llama
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": config.width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": own.kv_heads or config.heads,
        "mlp_hidden_size": config.mlp_width,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": own.norm_eps,
        "rope": True,
        "rope_theta": own.rotary_base,
        "include_bias": False,
        "include_qkv_bias": own.attention_bias,
        "weight_tying": own.tied,
        "max_sequence_length": length,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "mask_token_id": mask_id,
    }


_hf_name = _llama_name(
    _HF_BLOCK,
    "model.layers",
    {EMBEDDING: "model.embed_tokens.weight", _NORM: "model.norm.weight", HEAD: "lm_head.weight"},
)
_llada_name = _llama_name(
    _LLADA_BLOCK,
    "model.transformer.blocks",
    {
        EMBEDDING: "model.transformer.wte.weight",
        _NORM: "model.transformer.ln_f.weight",
        HEAD: "model.transformer.ff_out.weight",
    },
)


def _named_as_hf(name: str, architecture: str) -> Layout:
    """Autoregressive bases predict the next token, and Dream kept that: all of these shift."""
    return Layout(
        name=name.lower(),
        kind="llama",
        theirs=_hf_name,
        architecture=lambda source: _hf_architecture(source, shift=True),
        describe=_hf_config(name, architecture),
        derived=("rotary_emb.inv_freq",),
    )


ALL = {
    layout.name: layout
    for layout in (
        Layout("mdlm", "dit", _mdlm_name, _mdlm_architecture, _mdlm_config, ("rotary_emb.inv_freq",)),
        Layout("llada", "llama", _llada_name, _llada_architecture, _llada_config),
        _named_as_hf("Dream", "DreamModel"),
        _named_as_hf("llama", "LlamaForCausalLM"),
        _named_as_hf("qwen2", "Qwen2ForCausalLM"),
    )
}


def find_layout(source: Source, name: str) -> Layout:
    """By name, or ("auto") by the names of the tensors and `model_type`. UserError when it is none that we know."""
    if name != "auto":
        return ALL[name]
    names = source.tensors.shapes()
    if any(tensor.startswith(_MDLM) for tensor in names):
        return ALL["mdlm"]
    if ALL["llada"].theirs(EMBEDDING) in names:
        return ALL["llada"]
    kind = str(source.config.get("model_type")).lower()
    if ALL["llama"].theirs(EMBEDDING) in names and kind in ("llama", "qwen2", "dream"):
        return ALL[kind]
    example = next(iter(names), "no tensor")
    raise UserError(
        f"{source.path} is in no layout that scmdm knows (model_type {kind}, {example}); give format={'|'.join(ALL)}"
    )


def check_writable(layout: Layout, config: ModelConfig) -> None:
    """UserError when a model cannot be said in a layout."""
    if config.kind != layout.kind:
        fitting = "|".join(other.name for other in ALL.values() if other.kind == config.kind)
        raise UserError(f"format={layout.name} is not possible for model.kind={config.kind}; give format={fitting}")
    if config.labels:
        raise UserError(
            f"format={layout.name} is not possible: the model knows labels, which the layout has no place for; give "
            "format=scmdm|hub"
        )
    biased = {"llama": False, "qwen2": True, "dream": True}.get(layout.name)
    if biased is not None and biased != config.llama.attention_bias:
        having = "have" if biased else "have no"
        raise UserError(
            f"format={layout.name} is not possible: its queries, keys and values {having} biases; choose another"
        )
    if layout.name in ("llada", "dream") and config.llama.logit_shift != (layout.name == "dream"):
        predicted = "the position before" if layout.name == "dream" else "the position itself"
        raise UserError(
            f"format={layout.name} is not possible: it predicts a position from {predicted}; choose another"
        )
