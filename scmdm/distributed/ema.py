"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scmdm.config.training import EmaConfig
from scmdm.distributed.engine import Engine
from scmdm.torch_private import lerp_all_


class Ema:
    """`average = decay * average + (1 - decay) * weights` after every optimizer step.

    With `warmup` the decay is at most `(1 + k) / (10 + k)` at update k, counted from 1 as in MDLM's code. A new `Ema`
    starts from the current weights, after `updates` ones. An adaptation starts from the base's average: continuing the
    base's count of updates would keep the average close to the base for long.
    """

    update_number: int  # of the next update. Checkpoints of earlier versions count from 0, and a resume continues that

    def __init__(self, engine: Engine, config: EmaConfig, *, updates: int = 0) -> None:
        self.config = config
        self.update_number = updates + 1
        self.average = {name: value.clone() for name, value in engine.parameters().items()}

    def decay(self) -> float:
        """Return the decay of the next update."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + self.update_number) / (10 + self.update_number))

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """Add the current weights to the average."""
        current = engine.parameters()
        lerp_all_(list(self.average.values()), [current[name] for name in self.average], 1 - self.decay())
        self.update_number += 1

    @contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        """Run a block with the averaged weights in the model."""
        current = {name: value.clone() for name, value in engine.parameters().items()}
        engine.load_parameters(self.average)
        try:
            yield
        finally:
            engine.load_parameters(current)
