"""Contents of a checkpoint: the state of training besides tensors, and every tensor by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine
from scmdm.models.model_files import EMA_PREFIX, WEIGHTS_PREFIX

STATE_FILE = "state.json"


@dataclass
class TrainState:
    """State besides tensors that a resumed run needs to continue as if it had not been interrupted."""

    step: int = 0
    tokens: int = 0  # valid tokens trained on
    seconds: float = 0.0  # spent training, over all starts
    evaluations: int = 0  # denoiser evaluations times sequences
    loss_sum: float = 0.0  # over the steps since the last logged one
    loss_count: int = 0
    ema_updates: int = 0  # number of the next update, from 1; earlier versions counted from 0
    loader: dict[str, Any] | None = None
    data_fingerprint: str = ""
    base_sha256: str | None = None  # of the weights that an adaptation started from
    wandb_id: str | None = None
    best_nelbo: float | None = None  # over validations at a checkpoint; conditioned if the model is
    best_step: int | None = None


def named_tensors(engine: Engine, ema: Ema | None) -> dict[str, Tensor]:
    """Return this rank's part of every tensor that a checkpoint stores, by name.

    Tensors are shared with the engine, except those that it has to convert.
    """
    packed = {prefix: engine.pack(group) for prefix, group in trained_groups(engine, ema).items()}
    return with_prefixes(packed) | with_prefixes({WEIGHTS_PREFIX: engine.frozen()})


def trained_groups(engine: Engine, ema: Ema | None) -> dict[str, dict[str, Tensor]]:
    """Return trained weights, averages and optimizer moments by prefix and parameter, in the engine's own layout."""
    groups = {WEIGHTS_PREFIX: engine.parameters(), **{f"{kind}.": m for kind, m in engine.moments().items()}}
    if ema is not None:
        groups[EMA_PREFIX] = ema.average
    return groups


def with_prefixes(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge all groups into one dictionary, with each group's prefix before its names."""
    return {prefix + name: value for prefix, group in groups.items() for name, value in group.items()}
