"""The training loop of `scmdm train` and `scmdm adapt`: data, step, EMA, validation, checkpoints, logging."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import find_model
from scmdm.checkpoint.seal import sha256_of_model
from scmdm.checkpoint.writer import CheckpointWriter, snapshot
from scmdm.config.data import DataConfig
from scmdm.config.run import RunConfig
from scmdm.data.loader import build_loader, epochs
from scmdm.data.mixture import DataMixture, open_data
from scmdm.diffusion.state import Sequences
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import check_hardware
from scmdm.errors import UserError
from scmdm.models.model_files import StoredModel, open_model
from scmdm.observability.run_metrics import log_to, logger
from scmdm.observability.step_timer import Profiler
from scmdm.runtime.flight_recorder import dumping_to, enable_flight_recorder
from scmdm.runtime.preflight import log_preflight, run_preflight
from scmdm.runtime.run_lock import acquire_run_on_rank_0
from scmdm.runtime.start_log import record_start
from scmdm.runtime.watchdog import Watchdog, collective_timeout, set_aside_stacks
from scmdm.system.process_group import (
    World,
    all_reduce_max,
    barrier,
    current_world,
    first_found,
    on_rank_0,
    process_group,
)
from scmdm.system.run_directory import STACKS, require_place_of_run
from scmdm.system.signals import REQUEUE_EXIT, StopRequest
from scmdm.training.exchange import Upcoming, exchange
from scmdm.training.metrics_logger import MetricsLogger
from scmdm.training.optimizer import lr_factor, set_lr
from scmdm.training.padding import own_lengths, used_lengths
from scmdm.training.setup import build_engine, build_spec, resolve_config, resolve_engine
from scmdm.training.step import train_step
from scmdm.training.training_run import TrainingRun, config_yaml, describe, resume
from scmdm.training.validation import to_device, validation_nelbo


def run_training(config: RunConfig, base: Path | None, stop: StopRequest | None = None) -> Path:
    """Train to `config.train.steps`, from scratch or from the model at `base`; returns the run directory.

    The run resumes from its newest checkpoint if it has one. `stop` is the `StopRequest` of a caller that has already
    installed the signal handlers. Raises UserError for a mistake of the user, and SystemExit(REQUEUE_EXIT) after a stop
    signal, with a checkpoint saved.
    """
    world = current_world()
    config = resolve_engine(config, world)
    device, dtype = check_hardware(config, world.local_rank)
    # Store resolved values, so that a resume on other hardware does not continue in another precision.
    config = dataclasses.replace(config, device=device.type, precision=str(dtype).removeprefix("torch."))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    signals = StopRequest() if stop is None else contextlib.nullcontext(stop)
    # The timeout exceeds the watchdog's limits, because only the watchdog writes the stacks of all ranks.
    timeout = collective_timeout(config.train.watchdog_minutes)
    enable_flight_recorder()
    joined = process_group(world, device, needed=config.engine != "single", timeout=timeout)
    with signals as stop, dumping_to(Path(config.run_dir) / STACKS), joined:
        try:
            return _run(config, base, stop, world, device, dtype)
        except SystemExit:
            # The launcher ends all ranks when the first one has ended, and rank 0 still has files to close.
            barrier()
            raise


def _run(
    config: RunConfig,
    base_path: Path | None,
    stop: StopRequest,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
) -> Path:
    directory = Path(config.run_dir)
    require_place_of_run(directory)
    data = open_data_together(config.data, world)
    data.require_splits(config.data.train_split, config.data.validation_split)
    how = Verification("sizes" if config.verify == "sizes" else "descriptions", together=True)
    base = open_model(find_model(base_path, how)) if base_path is not None else None
    given, config = config, resolve_config(config, base)
    spec = build_spec(config, data.manifest, base)
    with acquire_run_on_rank_0(directory) as fence:
        on_rank_0(lambda: set_aside_stacks(directory))
        with Watchdog(directory, world, config.train.watchdog_minutes, fence) as watchdog:
            if base_path is not None and base is not None:
                # Weights are hashed under the watchdog, and after mistakes in the configuration have been reported.
                how = Verification(config.verify, weights="ema", together=True, beat=watchdog.beat)
                if (found := find_model(base_path, how)) != base.path:  # damaged, or a newer one was saved meanwhile
                    base = open_model(found)
                    config = resolve_config(given, base)
                    spec = build_spec(config, data.manifest, base)
            fence.require()
            preflight = run_preflight(config, data, spec, base, directory, world, device)
            engine = build_engine(config, spec, base, device, dtype)
            updates = 0 if base is None or config.ema.reset else base.spec.step
            ema = Ema(engine, config.ema, updates=updates) if config.ema.decay > 0 else None
            run = TrainingRun(config, directory, data, spec, engine, ema, watchdog, preflight, fence)
            _train(run, base, stop)
    return directory


def open_data_together(config: DataConfig, world: World) -> DataMixture:
    """Open the data on all ranks: one of each machine fetches and checks, for which it locks caches, before the others.

    All ranks call this together, and all raise UserError.
    """
    data, error = None, None
    if world.local_rank == 0:
        try:
            data = open_data(config)
        except (UserError, OSError) as found:
            error = found
    if (first := first_found(error)) is not None:
        raise first
    return open_data(config, checked=True) if data is None else data


def _train(run: TrainingRun, base: StoredModel | None, stop: StopRequest) -> None:
    with log_to(run.directory, write=run.engine.rank == 0, fence=run.fence) as console:
        resume(run, sha256_of_model(base.path) if base else None)
        if run.state.step >= run.config.train.steps:
            logger.info("%s is already at step %d of %d", run.directory, run.state.step, run.config.train.steps)
            return
        if early := all_reduce_max(stop.signal or 0):
            _leave(early, "before the first step")
        describe(run, base)
        log_preflight(run.preflight)
        if run.engine.rank == 0:
            record_start(run.directory, run.preflight, run.state.step, run.fence)
        step = run.state.step
        writer = CheckpointWriter(run.checkpoints, run.engine, run.config.train, run.fence, resumed_step=step)
        try:
            with MetricsLogger(run, console) as metrics:
                _loop(run, writer, metrics, stop)
        finally:
            writer.abandon()


def _loop(run: TrainingRun, writer: CheckpointWriter, metrics: MetricsLogger, stop: StopRequest) -> None:
    config, state, train, timer = run.config, run.state, run.config.train, metrics.timer
    with timer.part("data"):
        batches = _Lookahead(run, train.steps - state.step)
    met = exchange(run.engine, batches.first())
    met = exchange(run.engine, batches.read(int(met.longest_after)))
    everyone, longest = met.upcoming, int(met.longest_after)
    profiler = Profiler(run.directory, train.profile_step, run.engine.rank, run.fence)
    while state.step < train.steps:
        profiler.before(state.step + 1)
        started = time.perf_counter()
        lr = set_lr(run.engine.optimizer, lr_factor(state.step, train.steps, config.schedule))
        batch, state.loader = batches.take()
        run.engine.model.train()
        result = train_step(
            run.engine,
            config,
            run.spec.schedule,
            run.spec.mask_id,
            batch,
            state.step,
            timer,
            everyone=everyone,
            read_next=partial(batches.read, longest),
            received=lambda: stop.signal,
        )
        everyone, longest = result.upcoming, result.longest_after
        if run.ema is not None:
            with timer.part("optimizer"):
                run.ema.update(run.engine)
        metrics.count(result, started)
        if (trace := profiler.after(state.step)) is not None:
            logger.info("wrote %s", trace)
        last = state.step == train.steps
        if state.step % train.log_every == 0 or last:
            metrics.log_step(result, lr)
        validated = None
        if train.validate_every and (state.step % train.validate_every == 0 or last):
            with metrics.paused():
                validated = _validate(run, metrics)
        # Only some ranks may have received the signal, but all stop at the same step.
        stopped_by = result.signal
        if state.step % train.checkpoint_every == 0 or last or stopped_by:
            with timer.part("checkpoint"):
                _save(run, writer, validated, wait=bool(last or stopped_by))
        if stopped_by:
            _leave(stopped_by, f"at step {state.step}")


def _leave(number: int, when: str) -> NoReturn:
    logger.info("stopped by %s %s; run the same command to continue", signal.Signals(number).name, when)
    raise SystemExit(REQUEUE_EXIT)


class _Batch(NamedTuple):
    """This rank's share of a global batch as read, and the loader's position after it."""

    columns: dict[str, Tensor]
    position: dict[str, Any] | None


class _Lookahead:
    """Batches, the next of which is read and prepared during a step.

    With `train.padding=batch` a batch is prepared with the length of its longest sample on any rank: ranks exchange it
    a step before (`Upcoming.longest_after`), so that a batch is read a step earlier than it is prepared.
    """

    def __init__(self, run: TrainingRun, count: int) -> None:
        """Read the first of `count` batches if other ranks need the length of its longest sample."""
        self._run = run
        self._batches = itertools.islice(_batches(run), count)
        self._early = run.config.train.padding == "batch"
        self._after = next(self._batches, None) if self._early else None
        self._next: tuple[Sequences, dict[str, Any] | None] | None = None

    def first(self) -> Upcoming:
        """Return what other ranks need before the first batch is prepared."""
        return Upcoming(None, self._longest())

    def read(self, longest: int) -> Upcoming:
        """Prepare the next batch, whose longest sample has `longest` tokens, after the one after it has been read."""
        found = next(self._batches, None)
        if self._early:
            found, self._after = self._after, found
        self._next = None if found is None else (self._prepare(found, longest), found.position)
        return Upcoming(None if self._next is None else self._next[0], self._longest())

    def take(self) -> tuple[Sequences, dict[str, Any] | None]:
        """Return the batch that was prepared last, and the loader's position behind it."""
        assert self._next is not None
        return self._next

    def _longest(self) -> int:
        """Return the length of this rank's longest sample of the batch that was read last, where others need it."""
        if self._after is None:
            return 0
        return int(used_lengths(self._after.columns["tokens"], self._run.manifest).max())

    def _prepare(self, batch: _Batch, longest: int) -> Sequences:
        config, manifest, device = self._run.config, self._run.manifest, self._run.engine.device
        lengths_B = own_lengths(batch.columns["tokens"], manifest, config.train, lambda _: longest)
        return to_device(batch.columns, manifest, device, labels=config.model.labels, lengths_B=lengths_B)


def _batches(run: TrainingRun) -> Iterator[_Batch]:
    """Yield this rank's share of each global batch, endlessly."""
    config = run.config
    loader = build_loader(
        run.data,
        config.data.train_split,
        batch_size=config.train.global_batch_size // run.engine.data_size,
        replication=run.engine.world_size // run.engine.data_size,
        shuffle=True,
        seed=config.seed,
        num_canonical_nodes=config.data.num_canonical_nodes or 1,
        num_workers=config.data.num_workers,
        cache_limit=config.data.cache_limit,
        shuffle_block=config.data.shuffle_block,
        drop_last=True,
    )
    for batch in epochs(loader, config.train.global_batch_size, run.state.loader):
        yield _Batch(batch, loader.state_dict())


def _validate(run: TrainingRun, metrics: MetricsLogger) -> float:
    """Measure and log the NELBO with averaged weights; returns the conditioned one if the model is self-conditioned."""
    with run.ema.applied(run.engine) if run.ema is not None else contextlib.nullcontext():
        measure = partial(validation_nelbo, run.engine, run.config, run.spec, run.data, on_batch=run.watchdog.beat)
        null = measure(condition=False)
        conditioned = None
        if run.spec.model.self_conditioned:
            conditioned = measure(condition=True)
    metrics.log_validation(null, conditioned)
    return (conditioned or null).mean


def _save(run: TrainingRun, writer: CheckpointWriter, validated: float | None, *, wait: bool) -> None:
    """Save a checkpoint of this step. `validated` is the validation NELBO at this step, if measured."""
    state, config = run.state, run.config
    state.ema_updates = run.ema.update_number if run.ema is not None else 0
    if (
        validated is not None
        and math.isfinite(validated)
        and (state.best_nelbo is None or validated < state.best_nelbo)
    ):
        state.best_nelbo, state.best_step = validated, state.step
    run.spec.step, run.spec.tokens = state.step, state.tokens
    tokenizer = run.data.tokenizer_file
    captured = snapshot(run.engine, run.ema, state, run.spec, run.manifest, tokenizer, config_yaml(config))
    writer.save(captured, wait=wait)
