"""The DiT of kuleshov-group/mdlm.

UDLM (kuleshov-group/discrete-diffusion-guidance) and Duo (s-sahoo/duo) share the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from scmdm.config.model import ModelConfig
from scmdm.convert.layout import EMBEDDING, PublishedLayout
from scmdm.convert.published_config import PublishedConfig, count_blocks, matrix_shape
from scmdm.convert.published_files import PublishedFiles
from scmdm.errors import UserError
from scmdm.models.dit import DiTConfig
from scmdm.models.rotary import inverse_frequencies

_PREFIX = "backbone."
_FREQUENCIES = "rotary_emb.inv_freq"


def _published_name(ours: str) -> str:
    return _PREFIX + ours


def _recognises(source: PublishedFiles) -> bool:
    return any(name.startswith(_PREFIX) for name in source.tensors.shapes())


def _architecture(source: PublishedFiles) -> DiTConfig:
    """Read the architecture: heads, dropout and time conditioning from the configuration, the rest from shapes."""
    saved = source.config.get("model")
    flat = {**source.config, **(saved if isinstance(saved, dict) else {})}
    config = PublishedConfig(PublishedFiles(source.path, flat, source.tensors))
    config.expect("parameterization", "subs", "d3pm")
    config.expect("backbone", "dit")
    _refuse_other_networks(source)
    width = matrix_shape(source, _PREFIX + EMBEDDING)[1]
    table = source.tensors.shapes().get(_PREFIX + _FREQUENCIES)
    heads = config.integer("n_heads", width // (2 * table[0]) if table is not None and len(table) == 1 else None)
    if width % (2 * heads):
        raise UserError(
            f"{source.path}: n_heads={heads} in its configuration is not possible; width {width} must be a multiple "
            "of twice that"
        )
    return DiTConfig(
        width=width,
        layers=count_blocks(source, rf"{re.escape(_PREFIX)}blocks\.(\d{{1,6}})\."),
        heads=heads,
        condition_width=matrix_shape(source, f"{_PREFIX}sigma_map.mlp.2.weight")[0],
        mlp_ratio=max(1, matrix_shape(source, f"{_PREFIX}blocks.0.mlp.0.weight")[0] // width),
        time_conditioning=config.flag("time_conditioning"),
        dropout=config.number("dropout", 0.0, 0, 0.99),
    )


def _refuse_other_networks(source: PublishedFiles) -> None:
    names = source.tensors.shapes()
    if any(name.startswith(f"{_PREFIX}cond_map.") for name in names):
        raise UserError(f"{source.path} is conditioned on classes (cond_map), which scmdm does not import")
    if f"{_PREFIX}sigma_map.mlp.0.weight" not in names and any(name.startswith(_PREFIX) for name in names):
        raise UserError(
            f"{source.path} has no sigma_map: it is a causal model, or not MDLM's DiT; give a bidirectional one"
        )


def _describe(config: ModelConfig, vocab_size: int, mask_id: int, length: int) -> dict[str, Any]:
    assert isinstance(config, DiTConfig)
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
    describe=_describe,
    unsupported=_unsupported,
    derived=(_FREQUENCIES,),
    derived_tensors=_derived_tensors,
    bos_policy="loss",
)
