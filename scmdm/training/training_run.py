"""A training run: its directory, data, model, engine and state."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import load_checkpoint, newest_checkpoint
from scmdm.checkpoint.train_state import TrainState
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
from scmdm.observability.environment import describe_environment
from scmdm.observability.run_metrics import logger
from scmdm.observability.step_timer import Utilization
from scmdm.runtime.preflight import PreflightReport
from scmdm.runtime.watchdog import Watchdog
from scmdm.system.files import atomic_write_text, json_text
from scmdm.system.lease import Fence
from scmdm.system.run_directory import CHECKPOINTS, CONFIG_FILE, ENVIRONMENT_FILE
from scmdm.training.setup import check_dependent_settings, check_same_run, resolve_sample_order


@dataclass
class TrainingRun:
    """Everything that the training loop needs."""

    config: RunConfig
    directory: Path
    data: DataMixture
    spec: ModelSpec
    engine: Engine
    ema: Ema | None
    watchdog: Watchdog
    preflight: PreflightReport
    fence: Fence  # of the directory's lease, which rank 0 holds
    state: TrainState = field(default_factory=TrainState)

    @property
    def utilization(self) -> Utilization:
        """FLOPs per sequence, and the device's peak FLOP/s."""
        conditioning = self.config.self_conditioning
        flops = step_flops(
            self.spec.model,
            self.spec.vocab_size,
            self.spec.length,
            self.spec.schedule,
            passes=self.config.estimate_passes,
            stop_gradient=conditioning.stop_gradient,
            trained_layers=self.config.trained_layers,
            block_length=self.spec.diffusion.block_length,
            shared_layers=self.config.shared_layers,
        )
        return Utilization(flops, peak_flops(self.engine.device), self.engine.world_size)

    @property
    def checkpoints(self) -> Path:
        return self.directory / CHECKPOINTS

    @property
    def manifest(self) -> Manifest:
        return self.data.manifest


def resume(run: TrainingRun, base_sha256: str | None) -> None:
    """Load the newest checkpoint that verifies, if there is one, and write the configuration into the run directory.

    Raises UserError if all checkpoints are damaged, or if configuration, data or base differ from the earlier start.
    """
    how = Verification(run.config.verify, together=True, beat=run.watchdog.beat)
    path, skipped = newest_checkpoint(run.checkpoints, how)
    for line in skipped if run.engine.rank == 0 else ():  # all ranks have the same
        logger.warning("%s", line)
    if path is None and skipped:
        raise UserError(
            f"run_dir={run.directory} holds no checkpoint that verifies ({skipped[0]}); "
            "restore one of them, or choose another run_dir to start from scratch"
        )
    fingerprint = run.manifest.fingerprint()
    run.config = resolve_sample_order(run.config, run.data, path)
    if path is not None:
        check_same_run(run.config, path)
        run.state = load_checkpoint(path, run.engine, run.ema)
        check_dependent_settings(run.config, path, run.state)
        if run.state.data_fingerprint != fingerprint:
            raise UserError(
                f"{run.config.data.label} is not the data that {run.directory} was trained on; "
                "restore that data, or choose another run_dir"
            )
        if run.state.base_sha256 != base_sha256:
            raise UserError(
                f"base={run.config.base} is not the model that {run.directory} was adapted from; "
                "restore that model, or choose another run_dir"
            )
        logger.info("resuming from %s", path)
    run.state.data_fingerprint, run.state.base_sha256 = fingerprint, base_sha256
    if run.engine.rank != 0:
        return
    run.fence.require()
    atomic_write_text(run.directory / CONFIG_FILE, config_yaml(run.config))
    environment = run.directory / ENVIRONMENT_FILE
    if run.state.step < run.config.train.steps or not environment.exists():  # a finished run keeps that of its training
        atomic_write_text(environment, json_text(describe_environment(), indent=2))


def config_yaml(config: RunConfig) -> str:
    """Return the configuration as it is stored: paths are absolute, so that other commands find them from anywhere."""
    streams = {name: replace(stream, path=os.path.abspath(stream.path)) for name, stream in config.data.streams.items()}
    data = replace(config.data, path=_absolute(config.data.path), streams=streams)
    return to_yaml(replace(config, run_dir=os.path.abspath(config.run_dir), base=_absolute(config.base), data=data))


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def describe(run: TrainingRun, base: StoredModel | None) -> None:
    """Log model size, engine, data and epochs."""
    config, info = run.config, run.manifest.splits[run.config.data.train_split]
    origin = f"adapting {base.path} (step {base.spec.step})" if base else "training from scratch"
    epochs = config.train.steps * config.train.global_batch_size / info.samples
    model = run.engine.model
    total, trained = (count_parameters(model, trained=trained) / 1e6 for trained in (False, True))
    part = f" ({trained:.2f}M trained)" if config.trained_layers is not None else ""
    logger.info("%s: %.2fM parameters%s, rate %g", origin, total, part, config.self_conditioning.rate)
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
