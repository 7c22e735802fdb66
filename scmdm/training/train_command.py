"""`scmdm train` and `scmdm adapt`.

Signals are caught before the imports of torch, which take seconds: a job may be told to stop at any time.
"""

from __future__ import annotations

from pathlib import Path

from scmdm.config.run import RunConfig
from scmdm.system.signals import StopRequest


def train(config: RunConfig) -> None:
    """Train a model from scratch, or resume the run."""
    with StopRequest() as stop:
        from scmdm.training.trainer import run_training

        config.check_command("train")
        run_training(config, None, stop)


def adapt(config: RunConfig) -> None:
    """Adapt `config.base`, or resume the run."""
    with StopRequest() as stop:
        from scmdm.training.trainer import run_training

        config.check_command("adapt")
        run_training(config, Path(str(config.base)), stop)
