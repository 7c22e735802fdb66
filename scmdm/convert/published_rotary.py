"""Rotary angles in the configurations that `transformers` 4 and 5 write.

Version 4 writes `rope_theta` and `rope_scaling`, whose kind is `rope_type` or, in older files, `type`. Version 5 writes
all of it into `rope_parameters`.
"""

from __future__ import annotations

import math
from typing import Any

from scmdm.convert.published_config import PublishedConfig
from scmdm.convert.published_files import PublishedFiles
from scmdm.models.decoder_config import DecoderConfig

_LENGTH = "original_max_position_embeddings"
_LONGEST = "max_position_embeddings"
# Fields of each kind of scaling that are numbers: the key, and the value where the field is absent (None: required).
_NUMBERS: dict[str, dict[str, tuple[str, float | None]]] = {
    "default": {},
    "linear": {"factor": ("rotary_factor", None)},
    "dynamic": {"factor": ("rotary_factor", None)},
    "llama3": {
        "factor": ("rotary_factor", None),
        "low_freq_factor": ("rotary_slow_turns", None),
        "high_freq_factor": ("rotary_fast_turns", None),
    },
    "yarn": {
        "factor": ("rotary_factor", None),
        "beta_slow": ("rotary_slow_turns", 1.0),
        "beta_fast": ("rotary_fast_turns", 32.0),
    },
}
_DEFAULT_BASE = 10_000.0  # of transformers' classes


def read_rotary(config: PublishedConfig, source: PublishedFiles) -> dict[str, Any]:
    """Return the keys of `DecoderConfig` for the rotary angles. Raises UserError for scalings other than its own."""
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    if old and new and dict(old) != dict(new):
        raise config.refusal("rope_scaling", old, f"but rope_parameters={dict(new)}; which is meant is not known")
    name = "rope_parameters" if new else "rope_scaling"
    fields = PublishedConfig(source, new or old, name)
    stated = [kind for kind in (fields.get("rope_type"), fields.get("type")) if kind is not None] or ["default"]
    kind = stated[0]
    if not isinstance(kind, str) or kind not in _NUMBERS or stated[-1] != kind:
        raise config.refusal(name, dict(new or old), f"scmdm implements only rope_type {', '.join(_NUMBERS)}")
    fields.expect("partial_rotary_factor", 1.0)
    found: dict[str, Any] = {"rotary_base": _base(config, fields)}
    if kind != "default":
        found["rotary_scaling"] = kind
    for field, (key, absent) in _NUMBERS[kind].items():
        found[key] = fields.number(field, absent, 1 if field == "factor" else 1e-6, 1e6)
    if kind in ("llama3", "yarn") and found["rotary_fast_turns"] <= found["rotary_slow_turns"]:
        raise config.refusal(name, dict(new or old), "its factor for fast turns must be above that for slow ones")
    if kind == "llama3":
        found["rotary_length"] = fields.integer(_LENGTH)
    if kind == "yarn":
        found["rotary_attention_factor"] = _attention_factor(fields, found["rotary_factor"])
        found["rotary_truncate"] = fields.flag("truncate", default=True)
        found["rotary_length"] = fields.integer(_LENGTH) if fields.has(_LENGTH) else config.integer(_LONGEST)
    if kind == "dynamic":  # the original code reads the length from outside of the section
        found["rotary_length"] = config.integer(_LONGEST)
        fields.expect(_LENGTH, found["rotary_length"])
    fields.refuse_unknown({})
    return found


def _base(config: PublishedConfig, fields: PublishedConfig) -> float:
    outer = config.number("rope_theta", _DEFAULT_BASE, 1, 1e12)
    inner = fields.number("rope_theta", outer, 1, 1e12)
    if config.get("rope_theta") is not None and outer != inner:
        raise config.refusal("rope_theta", outer, f"but rope_parameters.rope_theta={inner}; which is meant is unknown")
    return inner


def _attention_factor(fields: PublishedConfig, factor: float) -> float | None:
    """Return YaRN's factor of queries and keys if it is not the one that follows from `factor`."""
    over, under = (fields.number(name, 0.0, 0, 1e3) for name in ("mscale", "mscale_all_dim"))
    if fields.has("attention_factor"):
        return fields.number("attention_factor", None, 1e-6, 1e3)
    if not over or not under:
        return None
    return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)


def describe_rotary(model: DecoderConfig) -> dict[str, Any]:
    """Return the fields for a model in the form of `transformers` 4, which version 5 reads, too."""
    described: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_scaling": None}
    kind = model.rotary_scaling
    if kind == "none":
        return described
    scaling = {"rope_type": kind} | {field: getattr(model, key) for field, (key, _) in _NUMBERS[kind].items()}
    if kind in ("llama3", "yarn"):
        scaling[_LENGTH] = model.rotary_length
    if kind == "yarn":
        scaling["truncate"] = model.rotary_truncate
        if model.rotary_attention_factor is not None:
            scaling["attention_factor"] = model.rotary_attention_factor
    longest = {_LONGEST: model.rotary_length} if kind == "dynamic" else {}
    return {**described, "rope_scaling": scaling, **longest}
