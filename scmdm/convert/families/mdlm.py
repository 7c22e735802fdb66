"""The DiT of kuleshov-group/mdlm.

UDLM (kuleshov-group/discrete-diffusion-guidance) and Duo (s-sahoo/duo) share the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.fields import shorten
from scmdm.config.model import ModelConfig
from scmdm.convert.layout import EMBEDDING, PublishedLayout, TokenIds, log_linear
from scmdm.convert.published_config import (
    TRANSFORMERS_FIELDS,
    Allowed,
    PublishedConfig,
    any_value,
    check_rows,
    count_blocks,
    matrix_shape,
)
from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError
from scmdm.models.dit import DiTConfig
from scmdm.models.model_files import ModelSpec
from scmdm.models.rotary import inverse_frequencies

_PREFIX = "backbone."
_FREQUENCIES = "rotary_emb.inv_freq"


def _published_name(ours: str) -> str:
    return _PREFIX + ours


def _recognises(source: PublishedFiles) -> bool:
    return any(name.startswith(_PREFIX) for name in source.tensors.shapes())


# Fields of `config.json`, as MDLM, UDLM and Duo write it.
_HARMLESS: dict[str, Allowed] = {
    **TRANSFORMERS_FIELDS,
    **any_value("model_length", "cfg_num_classes", "var_min"),
    "causal": (False,),
    "cfg": (False,),
}
# Sections and values of the configuration in a Lightning checkpoint: those on training, data and sampling.
_RUN_HARMLESS: dict[str, Allowed] = {
    **any_value(
        "T", "callbacks", "checkpointing", "classifier_backbone", "classifier_model", "data", "eval", "guidance"
    ),
    **any_value("hydra", "loader", "lr_scheduler", "mode", "optim", "prior", "sampling", "seed", "strategy"),
    **any_value("subs_masking", "trainer", "training", "wandb", "zero_recon_loss", "neg_infinity_mode"),
    "diffusion": ("absorbing_state", "uniform"),
    "is_vision": (False,),
}
_MODEL_HARMLESS: dict[str, Allowed] = {
    **any_value("length", "name", "scale_by_sigma", "tie_word_embeddings", "attn_backend", "mlp_ratio"),
    "type": ("ddit", "dit"),
}
_ALGO_HARMLESS: dict[str, Allowed] = {
    **any_value("T", "curriculum", "curriculum_end", "curriculum_start", "gamma_max", "gamma_min"),
    **any_value("gumbel_tau_log10_end", "gumbel_tau_log10_start", "ignore_bos", "integral_cache_path"),
    **any_value("linear_growth_dt", "linear_growth_max", "linear_growth_min", "loss_type", "posterior_loss_weight"),
    **any_value("subs_masking", "teacher_ema", "teacher_path", "update_teacher_every", "var_min"),
    "causal_attention": (False,),
    "name": ("d3pm", "distillation", "duo", "duo_base", "mdlm", "udlm"),
}
_PARAMETERIZATIONS = ("subs", "d3pm", "mean")  # all of them predict the clean token
_DROPOUT = 0.1  # default of the original code
_LOG_LINEAR = ("loglinear", "log-linear")
# What the classes of the original code take where `config.json` has no `time_conditioning`.
_CONDITIONED = {"mdlm": False, "udlm": True, "duo": True}


def _architecture(source: PublishedFiles) -> DiTConfig:
    """Read the architecture: heads, dropout and time conditioning from the configuration, the rest from shapes."""
    _refuse_other_networks(source)
    config = PublishedConfig(source)
    width = matrix_shape(source, _PREFIX + EMBEDDING)[1]
    layers = count_blocks(source, rf"{re.escape(_PREFIX)}blocks\.(\d{{1,6}})\.")
    condition_width = matrix_shape(source, f"{_PREFIX}sigma_map.mlp.2.weight")[0]
    of_run = bool(config.section("model")) or bool(config.section("algo"))
    network = PublishedConfig(source, config.section("model"), "model") if of_run else config
    network.match_weights("hidden_size" if of_run else "hidden_dim", width, "columns of the embedding")
    network.match_weights("n_blocks", layers, "blocks")
    network.match_weights("cond_dim", condition_width, "columns of the condition")
    table = source.tensors.shapes().get(_PREFIX + _FREQUENCIES)
    heads = network.integer("n_heads", width // (2 * table[0]) if table is not None and len(table) == 1 else None)
    if width % (2 * heads):
        raise network.refusal("n_heads", heads, f"width {width} must be a multiple of twice that")
    return DiTConfig(
        width=width,
        layers=layers,
        heads=heads,
        condition_width=condition_width,
        mlp_ratio=max(1, matrix_shape(source, f"{_PREFIX}blocks.0.mlp.0.weight")[0] // width),
        dropout=network.number("dropout", _DROPOUT, 0, 0.99),
        time_conditioning=_check_run(config, network, source) if of_run else _check_hub(config, source),
    )


def _diffusion(source: PublishedFiles) -> DiffusionConfig:
    """Read the noise of a run of Duo's code, which states it in full; others take MDLM's default (see `_notes`)."""
    config = PublishedConfig(source)
    if not config.section("algo"):
        return log_linear(source)
    noise = PublishedConfig(source, config.section("noise"), "noise")
    kind = "cosine" if noise.get("type") == "cosine" else "log_linear"
    return DiffusionConfig(schedule=kind, eps=noise.number("eps", log_linear(source).eps, 0, 0.5))


def _notes(source: PublishedFiles) -> list[str]:
    """Name another noise of a run of MDLM's code, on which a network without time conditioning does not depend."""
    config = PublishedConfig(source)
    kind = config.section("noise").get("type")
    if config.section("algo") or kind is None or kind in _LOG_LINEAR:
        return []
    return [f"noise.type={shorten(kind)} becomes log_linear: the network is not conditioned on time"]


def _check_hub(config: PublishedConfig, source: PublishedFiles) -> bool:
    """Check the other fields of a `config.json`, and return whether the network is conditioned on time."""
    kind = config.get("model_type")
    config.expect("model_type", *_CONDITIONED)
    check_rows(config, matrix_shape(source, _PREFIX + EMBEDDING)[0], "vocab_size")
    conditioned = _stated(source, {"time_conditioning": config}, _CONDITIONED.get(str(kind)))
    config.refuse_unknown(_HARMLESS)
    return conditioned


def _check_run(config: PublishedConfig, network: PublishedConfig, source: PublishedFiles) -> bool:
    """Check the other fields of a run's configuration, and return whether the network is conditioned on time.

    MDLM has `parameterization`, `backbone` and `time_conditioning` at the top, Duo in the section `algo`.
    """
    algo, noise = (PublishedConfig(source, config.section(name), name) for name in ("algo", "noise"))
    for place in (config, algo):
        place.expect("parameterization", *_PARAMETERIZATIONS)
        place.expect("backbone", "dit")
    conditioned = _stated(source, {"time_conditioning": config, "algo.time_conditioning": algo}, None)
    if config.section("algo"):
        noise.expect("type", *_LOG_LINEAR, "cosine")
    elif conditioned:
        noise.expect("type", *_LOG_LINEAR)
    config.refuse_unknown(_RUN_HARMLESS)
    network.refuse_unknown(_MODEL_HARMLESS)
    algo.refuse_unknown(_ALGO_HARMLESS)
    return conditioned


def _stated(source: PublishedFiles, places: Mapping[str, PublishedConfig], default: bool | None) -> bool:
    """Return the flag `time_conditioning`, which one of the places must state unless there is a default."""
    given = {name: place.flag("time_conditioning") for name, place in places.items() if place.has("time_conditioning")}
    if len(set(given.values())) > 1:
        raise UserError(f"{source.path}: {given} in its configuration contradict each other; give time_conditioning=")
    if not given and default is None:
        raise UserError(
            f"{source.path} does not say whether the network is conditioned on the noise level; give "
            "time_conditioning=false (MDLM) or time_conditioning=true (UDLM, Duo, D3PM)"
        )
    return next(iter(given.values()), bool(default))


def _refuse_other_networks(source: PublishedFiles) -> None:
    names = source.tensors.shapes()
    if any(name.startswith(f"{_PREFIX}cond_map.") for name in names):
        raise UserError(f"{source.path} is conditioned on classes (cond_map), which scmdm does not import")
    if f"{_PREFIX}sigma_map.mlp.0.weight" not in names and any(name.startswith(_PREFIX) for name in names):
        raise UserError(
            f"{source.path} has no sigma_map: it is a causal model, or not MDLM's DiT; give a bidirectional one"
        )


def _describe(spec: ModelSpec, ids: TokenIds) -> dict[str, Any]:
    config = spec.model
    assert isinstance(config, DiTConfig)
    return {
        "architectures": ["MDLM"],
        "model_type": "mdlm",
        "hidden_dim": config.width,
        "n_blocks": config.layers,
        "n_heads": config.heads,
        "cond_dim": config.condition_width,
        "dropout": config.dropout or 0.0,
        "model_length": spec.length,
        "time_conditioning": config.time_conditioning,
        "vocab_size": spec.vocab_size,
        **ids.as_fields(),
    }


def _unsupported(config: ModelConfig) -> str | None:
    if config.labels:
        return "it has no label embedding, but the model has model.labels=true"
    if config.attention_width != config.width:
        return f"its head width is model.width / model.heads, but the model has model.head_width={config.head_width}"
    return None


def _derived_tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    yield _PREFIX + _FREQUENCIES, inverse_frequencies(config.head_dim)


MDLM = PublishedLayout(
    name="mdlm",
    kind="dit",
    published_name=_published_name,
    recognises=_recognises,
    architecture=_architecture,
    diffusion=_diffusion,
    notes=_notes,
    describe=_describe,
    unsupported=_unsupported,
    derived=(_FREQUENCIES,),
    derived_tensors=_derived_tensors,
    lengths=("model_length", "model.length"),
    bos_policy="loss",
)
