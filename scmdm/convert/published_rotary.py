"""Rotary angles in the configurations that `transformers` 4 and 5 write.

Version 4 writes `rope_theta` and `rope_scaling`, whose kind is `rope_type` or, in older files, `type`. Version 5 writes
all of it into `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scmdm.convert.published_config import PublishedConfig
from scmdm.convert.published_files import PublishedFiles
from scmdm.models.decoder import DecoderConfig

_LLAMA3 = {
    "low_freq_factor": "rotary_slow_turns",
    "high_freq_factor": "rotary_fast_turns",
    "original_max_position_embeddings": "rotary_length",
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
    if kind not in ("default", "linear", "llama3") or stated[-1] != kind:
        raise config.refusal(name, dict(new or old), "scmdm implements only rope_type default, linear and llama3")
    fields.expect("partial_rotary_factor", 1.0)
    found: dict[str, Any] = {"rotary_base": _base(config, fields)}
    if kind != "default":
        found |= {"rotary_scaling": kind, "rotary_factor": fields.number("factor", None, 1, 1e6)}
    if kind == "llama3":
        found["rotary_slow_turns"] = fields.number("low_freq_factor", None, 1e-6, 1e6)
        found["rotary_fast_turns"] = fields.number("high_freq_factor", None, 1e-6, 1e6)
        if found["rotary_fast_turns"] <= found["rotary_slow_turns"]:
            raise config.refusal(name, dict(new or old), "high_freq_factor must be above low_freq_factor")
        found["rotary_length"] = fields.integer("original_max_position_embeddings")
    fields.refuse_unknown({})
    return found


def _base(config: PublishedConfig, fields: PublishedConfig) -> float:
    outer = config.number("rope_theta", _DEFAULT_BASE, 1, 1e12)
    inner = fields.number("rope_theta", outer, 1, 1e12)
    if config.get("rope_theta") is not None and outer != inner:
        raise config.refusal("rope_theta", outer, f"but rope_parameters.rope_theta={inner}; which is meant is unknown")
    return inner


def describe_rotary(model: DecoderConfig) -> dict[str, Any]:
    """Return the fields for a model in the form of `transformers` 4, which version 5 reads, too."""
    scaling: Mapping[str, Any] | None = None
    if model.rotary_scaling != "none":
        scaling = {"rope_type": model.rotary_scaling, "factor": model.rotary_factor}
    if model.rotary_scaling == "llama3":
        scaling = {**(scaling or {}), **{theirs: getattr(model, ours) for theirs, ours in _LLAMA3.items()}}
    return {"rope_theta": model.rotary_base, "rope_scaling": scaling}
