"""Import and export of a family of published decoders, from its entry in `scmdm.convert.families.decoders`.

An entry lists fields of `config.json` that set keys of `DecoderConfig`, fields whose value scmdm requires, fields that
change nothing, and the names of tensors. A field that it does not list is refused by name on import, and a key that it
does not set is refused by name on export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, get_args, get_type_hints

from scmdm.config.fields import Key, OnAdapt, rules_of, shorten, walk_keys
from scmdm.config.model import ModelConfig
from scmdm.convert.layout import EMBEDDING, PublishedLayout, TokenIds
from scmdm.convert.published_config import Allowed, PublishedConfig, check_rows, count_blocks, matrix_shape, validated
from scmdm.convert.published_files import PublishedFiles
from scmdm.convert.published_rotary import describe_rotary, read_rotary
from scmdm.errors import UserError
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.model_files import ModelSpec

_CONVERTED = "a2d-"  # prefix of dllm's types
_REQUIRED: Any = object()
_KINDS = {  # type of each key: bool, int or float
    name: next(kind for kind in (bool, int, float, object) if kind in (hint, *get_args(hint)) or kind is object)
    for name, hint in get_type_hints(DecoderConfig).items()
}
_RULES = {field.name: rules_of(field) or Key("") for field in fields(DecoderConfig)}


@dataclass(frozen=True)
class PublishedField:
    """A field of a configuration: keys of `DecoderConfig` that it sets, and its value where it is absent or null."""

    keys: tuple[str, ...]
    absent: Any


def sets(*keys: str, absent: Any = _REQUIRED) -> PublishedField:
    """Declare a field that sets keys of the model; without `absent` it is required."""
    return PublishedField(keys, absent)


@dataclass(frozen=True)
class Family:
    """A family of published decoders.

    Attributes:
        name: Value of the key `format`.
        architecture: Class of the original code.
        model_types: Values of `model_type`; exports name the first.
        published_name: Maps our name of a parameter to the published one.
        fields: Fields that set keys of the model.
        keys: Keys that have this value in the whole family. Those that neither `fields` nor `keys` set have their
            defaults.
        expected: Fields with the only value that scmdm implements. Exports state them.
        stated: Those of `expected` that must be there, because the original code takes something else by default.
        harmless: Fields that change nothing, or not with the values listed.
        written: Further fields of exports.
        own_names: Whether the names of its tensors identify the family.
        layers: Field of the number of blocks.
        length: Field of the longest sample.
        rows: Fields of the number of rows of the embedding.
        scaled: Whether the original code scales rotary angles as `transformers` does.
        shifted: The only `logit_shift` that programs of this layout support; None: both, and exports state it.
        block_field: Field of the tokens per block; None: the layout has no place for it.
        of_blocks: Whether all models of the family are models of blocks.
        of_experts: Whether all models of the family have experts.
        expert_flags: Field that lists for each block whether it has experts (1) or not (0).
        impossible: Explains why the family has no such model; None if it can have it.
    """

    name: str
    architecture: str
    model_types: tuple[str, ...]
    published_name: Callable[[str], str]
    fields: Mapping[str, PublishedField]
    harmless: Mapping[str, Allowed]
    keys: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    stated: tuple[str, ...] = ()
    written: Mapping[str, Any] = field(default_factory=dict)
    own_names: bool = False
    layers: str = "num_hidden_layers"
    length: str = "max_position_embeddings"
    rows: tuple[str, ...] = ("vocab_size",)
    scaled: bool = True
    shifted: bool | None = None
    block_field: str | None = "block_length"
    of_blocks: bool = False
    of_experts: bool = False
    expert_flags: str | None = None
    impossible: Callable[[DecoderConfig], str | None] = lambda _: None


def decoder_layout(family: Family) -> PublishedLayout:
    """Make the layout of a family."""
    return PublishedLayout(
        name=family.name,
        kind="decoder",
        published_name=family.published_name,
        recognises=partial(_recognises, family),
        architecture=partial(_architecture, family),
        describe=partial(_describe, family),
        unsupported=partial(_unsupported, family),
        logit_shift=partial(_shift, family),
        names_mask=partial(_names_mask, family),
        lengths=(family.length,),
        block_field=family.block_field,
        of_blocks=family.of_blocks,
        of_experts=family.of_experts,
        derived=("rotary_emb.inv_freq",),
        card_note=_causal_note if family.shifted is None else lambda _: "",
    )


def _recognises(family: Family, source: PublishedFiles) -> bool:
    named = family.published_name(EMBEDDING) in source.tensors.shapes()
    kind = str(source.config.get("model_type")).lower()
    return named and (family.own_names or kind in {known.lower() for known in family.model_types})


def _architecture(family: Family, source: PublishedFiles) -> DecoderConfig:
    config = PublishedConfig(source)
    config.expect("model_type", *family.model_types)
    prefix = re.escape(family.published_name("blocks.0.norm1.weight").partition("0")[0])
    config.match_weights(family.layers, layers := count_blocks(source, prefix + r"(\d{1,6})\."), "blocks")
    config.expect("layer_types", ["full_attention"] * layers)
    for name, value in family.expected.items():
        given = name in source.config and (value is None or source.config[name] is not None)
        if name in family.stated and not given:
            raise config.refusal(name, None, f"scmdm implements only {shorten(value)}, which is not the default")
        config.expect(name, value, absent=value)
    keys = {"layers": layers, **family.keys}
    for name, published in family.fields.items():
        keys |= dict.fromkeys(published.keys, _read(config, name, published))
    if family.scaled:
        keys |= read_rotary(config, source)
    if family.expert_flags is not None:
        keys["dense_layers"] = _dense_layers(config, family.expert_flags, layers)
    config.get(family.block_field or "")  # the import reads it
    check_rows(config, matrix_shape(source, family.published_name(EMBEDDING))[0], *family.rows)
    config.refuse_unknown(family.harmless)
    model = validated(DecoderConfig(**_completed(keys)), source)
    if (reason := _impossible(family, model)) is not None:
        raise UserError(f"{source.path}: it is not a model of the layout {family.name}: {reason}")
    return model


def _dense_layers(config: PublishedConfig, name: str, layers: int) -> int:
    """Return the number of first blocks without experts, from a flag for each block."""
    flags = config.get(name)
    dense = flags.count(0) if isinstance(flags, list) else 0
    if flags != _flags(layers, dense):
        raise config.refusal(name, flags, f"scmdm implements only {layers} flags, first 0 and then 1")
    return dense


def _flags(layers: int, dense: int) -> list[int]:
    return [0] * dense + [1] * (layers - dense)


def _impossible(family: Family, model: DecoderConfig) -> str | None:
    if family.of_experts and not model.experts:
        return "its models have experts, but this one has model.experts=0"
    return family.impossible(model)


def _read(config: PublishedConfig, name: str, published: PublishedField) -> Any:
    if published.absent is not _REQUIRED and not config.has(name):
        return published.absent
    key = published.keys[0]
    return config.value(name, _KINDS[key], _RULES[key])


def _completed(keys: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a null means, and remove what is the model's default."""
    width, heads = keys["width"], keys["heads"]
    head_width = keys.get("head_width") or max(1, width // heads)
    changed: dict[str, Any] = {"head_width": None if head_width * heads == width else head_width}
    if keys["kv_heads"] is None:
        changed["kv_heads"] = heads
    if keys["mlp_width"] is None:
        changed["mlp_width"] = keys["mlp_ratio"] * width
    if keys.get("attention_multiplier") == head_width**-0.5:
        changed["attention_multiplier"] = None
    return keys | changed


def _shift(family: Family, source: PublishedFiles, has_mask: bool) -> bool | None:
    """Return whether a position is predicted from the one before it; None if the files do not say.

    Exports of scmdm state it. Dream kept the shift of its autoregressive base, dllm's A2D models did not. A causal
    class of `transformers` predicts the next token, unless there is a sign that the model was trained further.
    """
    if family.shifted is False:
        return False
    stated, architectures = source.config.get("logit_shift"), source.config.get("architectures")
    if isinstance(stated, bool):
        return stated
    if _is_converted(source):
        return False
    if family.shifted:
        return True if architectures in (None, [family.architecture]) else None
    trained_further = has_mask or source.config.get("auto_map") or source.config.get("is_causal") is False
    return True if architectures == [family.architecture] and not trained_further else None


def _names_mask(family: Family, source: PublishedFiles) -> bool:
    """Return whether it is a diffusion model: the vocabulary of an autoregressive one has no mask."""
    return family.shifted is not None or _is_converted(source)


def _is_converted(source: PublishedFiles) -> bool:
    return str(source.config.get("model_type")).lower().startswith(_CONVERTED)


def _describe(family: Family, spec: ModelSpec, ids: TokenIds) -> dict[str, Any]:
    config = spec.model
    assert isinstance(config, DecoderConfig)
    stated: dict[str, Any] = {} if family.shifted is not None else {"logit_shift": config.logit_shift}
    if family.block_field is not None and spec.diffusion.block_length is not None:
        stated[family.block_field] = spec.diffusion.block_length
    return {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        family.layers: config.layers,
        **{name: _value(config, published.keys[0]) for name, published in family.fields.items()},
        **family.expected,
        **family.written,
        family.length: spec.length,
        **(describe_rotary(config) if family.scaled else {}),
        **dict.fromkeys(family.rows, spec.vocab_size),
        **ids.as_fields(),
        **stated,
        **({family.expert_flags: _flags(config.layers, config.dense_layers)} if family.expert_flags else {}),
    }


def _value(config: DecoderConfig, key: str) -> Any:
    """Return a key's value, or what a null means."""
    implied = {
        "head_width": config.head_dim,
        "kv_heads": config.kv_heads or config.heads,
        "mlp_width": config.inner_width,
        "expert_width": config.expert_inner_width if config.experts else None,
        "attention_multiplier": config.attention_multiplier or config.head_dim**-0.5,
        "dropout": config.dropout or 0.0,
    }
    return implied.get(key, getattr(config, key))


def _causal_note(config: ModelConfig) -> str:
    shift = ", and a position is predicted from the one before it" if config.logit_shift else ""
    return "`transformers` loads the weights as a causal model, but attention must be bidirectional" + shift + "."


def _unsupported(family: Family, config: ModelConfig) -> str | None:
    """Name the first key that changes what the model computes and that this layout cannot state."""
    assert isinstance(config, DecoderConfig)
    default = DecoderConfig(width=config.width, heads=config.heads, head_width=config.head_width)
    architecture = [name for name, rules, _ in walk_keys(default) if rules.on_adapt is OnAdapt.FROM_BASE]
    stated_together = [published.keys for published in family.fields.values()]
    covered = {"layers", "mlp_ratio", *(key for keys in stated_together for key in keys)}
    own_keys = ("rotary_scaling", "rotary_fraction")
    covered |= {name for name in architecture if name.startswith("rotary_") and name not in own_keys}
    covered |= {"rotary_scaling"} if family.scaled else set()
    covered |= {"dense_layers"} if family.expert_flags is not None else set()
    covered |= {"logit_shift"} if family.shifted is None else set()
    fixed = {name: _value(default, name) for name in architecture} | dict(family.keys)
    fixed |= {"head_width": config.width // config.heads, "logit_shift": family.shifted}
    for name in architecture:
        if name not in covered and (value := _value(config, name)) != fixed[name]:
            return f"its models have model.{name}={fixed[name]}, but this one has {value}"
    for first, *others in stated_together:
        for other in others:
            if getattr(config, first) != getattr(config, other):
                return f"it states model.{first} and model.{other} together, but in this model they differ"
    return _impossible(family, config)
