"""What a run is: its directory, its model in an engine, its state; resumed and described here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scmdm.checkpoint.checkpoint import TrainState, load_checkpoint, newest_checkpoint
from scmdm.config.loading import to_yaml
from scmdm.config.run import RunConfig
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine
from scmdm.errors import UserError
from scmdm.models.flops import peak_flops, step_flops
from scmdm.models.model_files import ModelSpec, StoredModel
from scmdm.models.network import count_parameters
from scmdm.observability.clock import Hardware
from scmdm.observability.environment import describe_environment
from scmdm.observability.metrics import logger
from scmdm.runtime.preflight import Started
from scmdm.runtime.watchdog import Watchdog
from scmdm.system.files import atomic_write_text
from scmdm.system.process_group import broadcast
from scmdm.training.setup import check_same_run


@dataclass
class Run:
    """Everything that the loop holds."""

    config: RunConfig
    directory: Path
    data: DataMixture
    spec: ModelSpec
    engine: Engine
    ema: Ema | None
    watchdog: Watchdog
    started: Started
    state: TrainState = field(default_factory=TrainState)

    @property
    def hardware(self) -> Hardware:
        """What utilisation is measured against."""
        conditioning = self.config.self_conditioning
        flops = step_flops(
            self.spec.model,
            self.spec.vocab_size,
            self.spec.length,
            self.spec.schedule,
            passes=conditioning.passes if conditioning.rate > 0 else 0,
            stop_gradient=conditioning.stop_gradient,
            trained_layers=self.config.trained_layers,
        )
        return Hardware(flops, peak_flops(self.engine.device), self.engine.world_size)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def manifest(self) -> Manifest:
        return self.data.manifest


def resume(run: Run, base_sha256: str | None) -> None:
    """Continue from the newest checkpoint that verifies, if there is one, and refuse to continue another run."""
    # Rank 0 reads and hashes; every rank takes its word.
    path, skipped = broadcast(newest_checkpoint(run.checkpoints) if run.engine.rank == 0 else (None, []))
    for line in skipped:
        logger.warning("%s", line)
    if path is None and skipped:
        raise UserError(
            f"run_dir={run.directory} holds no checkpoint that verifies ({skipped[0]}); "
            "restore one of them, or choose another run_dir to start anew"
        )
    fingerprint = run.manifest.fingerprint()
    if path is not None:
        check_same_run(run.config, path)
        run.state = load_checkpoint(path, run.engine, run.ema)
        if run.state.data_fingerprint != fingerprint:
            raise UserError(
                f"{run.config.data.label} is not the data that {run.directory} was trained on; "
                "give that one back, or choose another run_dir"
            )
        if run.state.base_sha256 != base_sha256:
            raise UserError(
                f"base={run.config.base} is not the model that {run.directory} was adapted from; "
                "give that one back, or choose another run_dir"
            )
        logger.info("resuming from %s", path)
    run.state.data_fingerprint, run.state.base_sha256 = fingerprint, base_sha256
    if run.engine.rank != 0:
        return
    atomic_write_text(run.directory / "config.yaml", to_yaml(run.config))
    atomic_write_text(run.directory / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")


def describe(run: Run, base: StoredModel | None) -> None:
    config, info = run.config, run.manifest.splits[run.config.data.train_split]
    origin = f"adapting {base.path} (step {base.spec.step})" if base else "training from scratch"
    epochs = config.train.steps * config.train.global_batch_size / info.samples
    model = run.engine.model
    numbers = [count_parameters(model, trained=trained) / 1e6 for trained in (False, True)]
    part = f", {numbers[1]:.2f}M of them trained" if config.trained_layers is not None else ""
    logger.info("%s: %.2fM parameters%s, rate %g", origin, numbers[0], part, config.self_conditioning.rate)
    logger.info(
        "engine %s on %d process(es), %s, %s, %d thread(s)",
        config.engine,
        run.engine.world_size,
        config.device,
        config.precision,
        torch.get_num_threads(),
    )
    logger.info(
        "%s: %d sequences of %d tokens, %.1f epochs", config.data.label, info.samples, run.manifest.length, epochs
    )
