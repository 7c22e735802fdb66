"""Upcycling (arXiv 2212.05055): the gated MLP of each block becomes experts that are copies of it, with a new router.

With renormalised weights, the sum of equal results is the result of one: the new model computes what the dense one
does, up to the rounding of the sum, and exactly with one expert per token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from scmdm.config.conversion import ImportConfig
from scmdm.config.model import ModelConfig
from scmdm.errors import UserError
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.initialization import initial_value

_MLP = re.compile(r"(blocks\.\d+)\.mlp_(gate|up|down)\.weight")


def upcycled_model(model: ModelConfig, config: ImportConfig) -> ModelConfig:
    """Return the architecture with `config.experts` experts. Raises UserError where that is not possible."""
    if not isinstance(model, DecoderConfig) or model.experts:
        found = f"model.kind={model.kind}" if not isinstance(model, DecoderConfig) else f"{model.experts} experts"
        raise UserError(f"experts={config.experts} is not possible for {found}; give a decoder without experts")
    changed: dict[str, Any] = {"experts": config.experts, "experts_per_token": config.experts_per_token}
    upcycled = dataclasses.replace(model, **changed)
    upcycled.validate()
    return upcycled


def upcycled_weights(weights: Iterator[tuple[str, Tensor]], experts: int) -> Iterator[tuple[str, Tensor]]:
    """Replace the weights of each MLP by copies for all experts, and add routers, whose seed is fixed."""
    for name, value in weights:
        found = _MLP.fullmatch(name)
        if found is None:
            yield name, value
            continue
        yield f"{found[1]}.experts.{found[2]}.weight", value.expand(experts, *value.shape).contiguous()
        if found[2] == "gate":
            router = f"{found[1]}.experts.router.weight"
            yield router, initial_value(router, (experts, value.shape[1]), seed=0).to(value.dtype)
