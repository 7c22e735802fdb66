"""`train` and `adapt`: one loop that orchestrates data, step, averaging, validation, checkpoints and logging."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from scmdm.config.load import to_yaml
from scmdm.config.schema import RunConfig
from scmdm.data.loader import build_loader, epochs
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import Data, open_data
from scmdm.environment import describe_environment
from scmdm.errors import UserError
from scmdm.files import atomic_write_text
from scmdm.model.dit import count_parameters
from scmdm.model.flops import peak_flops, step_flops
from scmdm.model.weights import LoadedModel, ModelSpec
from scmdm.parallel.engine import Engine, check_hardware
from scmdm.parallel.processes import World, barrier, broadcast, current_world, largest, process_group
from scmdm.training.checkpoint import (
    TrainState,
    load_checkpoint,
    newest_checkpoint,
    remove_leftovers,
    sha256_of_model,
)
from scmdm.training.ema import Ema
from scmdm.training.metrics import MetricsFile, StepDisplay, Tracker, format_duration, log_to, logger, start_wandb
from scmdm.training.optimizer import lr_factor, set_lr
from scmdm.training.saver import Saver, snapshot
from scmdm.training.setup import build_engine, build_spec, check_same_run, resolve_config, resolve_engine
from scmdm.training.step import StepResult, train_step
from scmdm.training.telemetry import Clock, Hardware, Profiler, Window, peak_memory_gib, step_parts
from scmdm.training.validation import to_device, validation_nelbo

REQUEUE_EXIT = 85  # stopped by a signal after saving: start the same command again to go on


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or Ctrl-C came; the loop acts at the end of the step."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {n: signal.signal(n, self._remember) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@dataclass
class Run:
    """Everything that the loop holds."""

    config: RunConfig
    directory: Path
    data: Data
    spec: ModelSpec
    engine: Engine
    ema: Ema | None
    state: TrainState = field(default_factory=TrainState)

    @property
    def hardware(self) -> Hardware:
        """What utilisation is measured against."""
        passes = self.config.self_conditioning.passes if self.config.self_conditioning.rate > 0 else 0
        flops = step_flops(self.spec.model, self.spec.vocab_size, self.spec.length, self.spec.schedule, passes=passes)
        return Hardware(flops, peak_flops(self.engine.device), self.engine.world_size)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def manifest(self) -> Manifest:
        return self.data.manifest


def run_training(config: RunConfig, base: LoadedModel | None) -> Path:
    """Train to `config.train.steps`, from scratch or from `base`, resuming by itself; returns the run directory.

    Raises UserError for mistakes and SystemExit(REQUEUE_EXIT) after a signal, with a checkpoint saved.
    """
    world = current_world()
    config = resolve_engine(resolve_config(config, base), world)
    device, dtype = check_hardware(config, world.local_rank)
    # What "auto" meant is part of the run: a resume on other hardware must not go on in another precision.
    config = dataclasses.replace(config, device=device.type, precision=str(dtype).removeprefix("torch."))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with process_group(world, device, needed=config.engine != "single"):
        return _run(config, base, world, device, dtype)


def _run(config: RunConfig, base: LoadedModel | None, world: World, device: torch.device, dtype: torch.dtype) -> Path:
    directory = Path(config.run_dir)
    data = open_data(config.data)
    data.require_splits(config.data.train_split, config.data.validation_split)
    spec = build_spec(config, data.manifest, base)
    with _claim(directory) if world.is_main else contextlib.nullcontext():
        barrier()
        engine = build_engine(config, spec, base, device, dtype)
        return _train(config, base, world, data, spec, engine)


def _train(
    config: RunConfig, base: LoadedModel | None, world: World, data: Data, spec: ModelSpec, engine: Engine
) -> Path:
    directory = Path(config.run_dir)
    run = Run(config, directory, data, spec, engine, Ema(engine, config.ema) if config.ema.decay > 0 else None)
    with log_to(directory, write=world.is_main) as console:
        _resume(run, sha256_of_model(base.path) if base else None)
        if run.state.step >= config.train.steps:
            logger.info("%s is already at step %d of %d", directory, run.state.step, config.train.steps)
            return directory
        _describe(run, base)
        tracker = None
        if world.is_main:
            tracker = start_wandb(config.wandb, directory, asdict(config), run.state.wandb_id)
            run.state.wandb_id = tracker.id if tracker else run.state.wandb_id
        metrics = MetricsFile(directory / "metrics.jsonl" if world.is_main else None, run.state.step)
        saver = Saver(run.checkpoints, engine, config.train)
        try:
            with StepDisplay(console, config.train.steps, run.state.step) as display, StopRequest() as stop:
                _loop(run, saver, metrics, tracker, display, stop)
        finally:
            saver.abandon()
            metrics.close()
            if tracker is not None:
                tracker.finish()
    return directory


def _loop(
    run: Run, saver: Saver, metrics: MetricsFile, tracker: Tracker | None, display: StepDisplay, stop: StopRequest
) -> None:
    config, state, train = run.config, run.state, run.config.train
    batches, clock, window = _batches(run), Clock(run.engine.device), Window()
    profiler = Profiler(run.directory, train.profile_step, run.engine.rank)
    while state.step < train.steps:
        profiler.before(state.step + 1)
        started = time.perf_counter()
        lr = set_lr(run.engine.optimizer, lr_factor(state.step, train.steps, config.schedule))
        with clock.part("data"):
            batch = next(batches)
        run.engine.model.train()
        result = train_step(run.engine, config, run.spec.schedule, run.spec.mask_id, *batch, state.step, clock)
        if run.ema is not None:
            with clock.part("optimizer"):
                run.ema.update(run.engine)
        _account(state, result, time.perf_counter() - started)
        window.add(result.tokens)
        display.advance(result.loss, result.tokens / (time.perf_counter() - started))
        if (trace := profiler.after(state.step)) is not None:
            logger.info("wrote %s", trace)
        last = state.step == train.steps
        if state.step % train.log_every == 0 or last:
            _log_step(run, metrics, tracker, result, lr, window, clock)
            window = Window()
        validated = None
        if train.validate_every and (state.step % train.validate_every == 0 or last):
            with window.paused():
                validated = _log_validation(run, metrics, tracker)
        # Every rank must see the same answer at the same step, whichever of them got the signal.
        stopped_by = largest(stop.signal or 0)
        if state.step % train.checkpoint_every == 0 or last or stopped_by:
            with clock.part("checkpoint"):
                _save(run, saver, validated, wait=bool(last or stopped_by))
        if stopped_by:
            logger.info(
                "stopped by %s at step %d; the same command goes on", signal.Signals(stopped_by).name, state.step
            )
            raise SystemExit(REQUEUE_EXIT)


def _batches(run: Run) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's share of each global batch, for ever, epoch after epoch; keeps the loader's position in the state."""
    config = run.config
    loader = build_loader(
        run.data,
        config.data.train_split,
        batch_size=config.train.global_batch_size // run.engine.world_size,
        shuffle=True,
        seed=config.seed,
        num_canonical_nodes=config.data.num_canonical_nodes,
        num_workers=config.data.num_workers,
        cache_limit=config.data.cache_limit,
        shuffle_block=config.data.shuffle_block,
        drop_last=True,
    )
    for batch in epochs(loader, config.train.global_batch_size, run.state.loader):
        run.state.loader = loader.state_dict()
        yield to_device(batch, run.manifest, run.engine.device)


def _account(state: TrainState, result: StepResult, seconds: float) -> None:
    state.step += 1
    state.tokens += result.tokens
    state.evaluations += result.evaluations
    state.seconds += seconds
    state.loss_sum += result.loss
    state.loss_count += 1


def _log_step(
    run: Run,
    metrics: MetricsFile,
    tracker: Tracker | None,
    result: StepResult,
    lr: float,
    window: Window,
    clock: Clock,
) -> None:
    state, train = run.state, run.config.train
    loss = state.loss_sum / state.loss_count
    state.loss_sum, state.loss_count = 0.0, 0
    seconds = window.seconds()
    speed = window.tokens / seconds
    row = {
        "kind": "train",
        "step": state.step,
        "loss": loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": state.tokens,
        "evaluations": state.evaluations,
        "tokens_per_s": speed,
        "seconds": state.seconds,
        **step_parts(clock.read(), window.steps),
        **run.hardware.utilisation(window.steps * train.global_batch_size / seconds),
        "peak_memory_gib": peak_memory_gib(run.engine.device),
    }
    metrics.write(row)
    if tracker is not None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        tracker.log({f"train/{k}": v for k, v in numbers.items()}, step=state.step)
    left = format_duration((train.steps - state.step) * result.tokens / speed)
    logger.info("step %d/%d loss %.4f lr %.2e %.0f tokens/s left %s", state.step, train.steps, loss, lr, speed, left)


def _log_validation(run: Run, metrics: MetricsFile, tracker: Tracker | None) -> float:
    """Measure and log the NELBO; returns the one that the model is meant for."""
    with run.ema.applied(run.engine) if run.ema is not None else contextlib.nullcontext():
        null = validation_nelbo(run.engine, run.config, run.spec, run.data, condition=False)
        conditioned = None
        if run.spec.model.self_conditioned:
            conditioned = validation_nelbo(run.engine, run.config, run.spec, run.data, condition=True)
    row = {
        "kind": "validation",
        "step": run.state.step,
        "nelbo_null": null.mean,
        "stderr_null": null.stderr,
        "nelbo_conditioned": conditioned.mean if conditioned else None,
        "stderr_conditioned": conditioned.stderr if conditioned else None,
        "weights": "ema" if run.ema is not None else "raw",
        "tokens": run.state.tokens,
    }
    metrics.write(row)
    if tracker is not None:
        numbers = {k: v for k, v in row.items() if isinstance(v, float)}
        tracker.log({f"validation/{k}": v for k, v in numbers.items()}, step=run.state.step)
    text = f"conditioned {conditioned.mean:.4f}" if conditioned else "vanilla"
    logger.info("step %d validation NELBO null %.4f +- %.4f %s", run.state.step, null.mean, null.stderr, text)
    return (conditioned or null).mean


def _save(run: Run, saver: Saver, validated: float | None, *, wait: bool) -> None:
    """Save this step; `validated` is its validation NELBO if there was one."""
    state, config = run.state, run.config
    state.ema_updates = run.ema.updates if run.ema is not None else 0
    if validated is not None and (state.best_nelbo is None or validated < state.best_nelbo):
        state.best_nelbo, state.best_step = validated, state.step
    run.spec.step, run.spec.tokens = state.step, state.tokens
    tokenizer = run.data.tokenizer_file
    copy = config.train.async_checkpoint and not wait
    taken = snapshot(run.engine, run.ema, state, run.spec, run.manifest, tokenizer, to_yaml(config), copy=copy)
    saver.save(taken, wait=wait)


def _resume(run: Run, base_sha256: str | None) -> None:
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


def _describe(run: Run, base: LoadedModel | None) -> None:
    config, info = run.config, run.manifest.splits[run.config.data.train_split]
    origin = f"adapting {base.path} (step {base.spec.step})" if base else "training from scratch"
    epochs = config.train.steps * config.train.global_batch_size / info.samples
    logger.info(
        "%s: %.2fM parameters, rate %g", origin, count_parameters(run.engine.model) / 1e6, config.self_conditioning.rate
    )
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


@contextlib.contextmanager
def _claim(directory: Path) -> Iterator[None]:
    """Create the run directory, prove that it can be written, and keep every other process out of it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run_dir={directory} cannot be made ({error.strerror}); choose a place that you may write to"
        ) from error
    atomic_write_text(directory / ".writable", "")
    (directory / ".writable").unlink()
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"run_dir={directory} is in use by another process; wait for it, stop it, or choose another run_dir"
        ) from error
    try:
        remove_leftovers(directory / "checkpoints")
        yield
    finally:
        lock.release()
