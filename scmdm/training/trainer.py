"""`train` and `adapt`: one loop that orchestrates data, step, averaging, validation, checkpoints and logging."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from scmdm.checkpoint.checkpoint import sha256_of_model
from scmdm.checkpoint.writer import Saver, snapshot
from scmdm.config.loading import to_yaml
from scmdm.config.run import RunConfig
from scmdm.data.loader import build_loader, epochs
from scmdm.data.mixture import open_data
from scmdm.diffusion.state import Sequences
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import check_hardware
from scmdm.models.model_files import StoredModel
from scmdm.observability.clock import Profiler
from scmdm.observability.metrics import log_to, logger
from scmdm.runtime.preflight import check_start, log_start
from scmdm.runtime.run_lock import claim_for_all
from scmdm.runtime.start_log import record_start
from scmdm.runtime.watchdog import Watchdog, longest_silence, set_aside_stacks
from scmdm.system.process_group import World, barrier, current_world, largest, process_group
from scmdm.system.signals import REQUEUE_EXIT, StopRequest
from scmdm.training.optimizer import lr_factor, set_lr
from scmdm.training.run import Run, describe, resume
from scmdm.training.run_reporting import Journal
from scmdm.training.setup import build_engine, build_spec, resolve_config, resolve_engine
from scmdm.training.step import train_step
from scmdm.training.validation import to_device, validation_nelbo


def run_training(config: RunConfig, base: StoredModel | None, stop: StopRequest | None = None) -> Path:
    """Train to `config.train.steps`, from scratch or from `base`, resuming by itself; returns the run directory.

    `stop` is where signals are remembered, if that has begun already. Raises UserError for mistakes and
    SystemExit(REQUEUE_EXIT) after a signal, with a checkpoint saved.
    """
    world = current_world()
    config = resolve_engine(resolve_config(config, base), world)
    device, dtype = check_hardware(config, world.local_rank)
    # What "auto" meant is part of the run: a resume on other hardware must not go on in another precision.
    config = dataclasses.replace(config, device=device.type, precision=str(dtype).removeprefix("torch."))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    signals = StopRequest() if stop is None else contextlib.nullcontext(stop)
    # The watchdog must be the first to lose its patience: it alone writes down where the ranks are.
    timeout = longest_silence(config.train.watchdog_minutes)
    with signals as stop, process_group(world, device, needed=config.engine != "single", timeout=timeout):
        try:
            return _run(config, base, stop, world, device, dtype)
        except SystemExit:
            # All ranks stop, but rank 0 has files to close, and the launcher ends all when the first is gone.
            barrier()
            raise


def _run(
    config: RunConfig,
    base: StoredModel | None,
    stop: StopRequest,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
) -> Path:
    directory = Path(config.run_dir)
    data = open_data(config.data)
    data.require_splits(config.data.train_split, config.data.validation_split)
    spec = build_spec(config, data.manifest, base)
    with claim_for_all(directory):
        if world.is_main:
            set_aside_stacks(directory)
        barrier()
        with Watchdog(directory, world, config.train.watchdog_minutes) as watchdog:
            started = check_start(config, data, spec, base, directory, world, device)
            engine = build_engine(config, spec, base, device, dtype)
            carried = 0 if base is None or config.ema.reset else base.spec.step
            ema = Ema(engine, config.ema, updates=carried) if config.ema.decay > 0 else None
            _train(Run(config, directory, data, spec, engine, ema, watchdog, started), base, stop)
    return directory


def _train(run: Run, base: StoredModel | None, stop: StopRequest) -> None:
    with log_to(run.directory, write=run.engine.rank == 0) as console:
        resume(run, sha256_of_model(base.path) if base else None)
        if run.state.step >= run.config.train.steps:
            logger.info("%s is already at step %d of %d", run.directory, run.state.step, run.config.train.steps)
            return
        if early := largest(stop.signal or 0):
            _leave(early, "before the first step")
        describe(run, base)
        log_start(run.started)
        if run.engine.rank == 0:
            record_start(run.directory, run.started, run.state.step)
        saver = Saver(run.checkpoints, run.engine, run.config.train)
        try:
            with Journal(run, console) as journal:
                _loop(run, saver, journal, stop)
        finally:
            saver.abandon()


def _loop(run: Run, saver: Saver, journal: Journal, stop: StopRequest) -> None:
    config, state, train, clock = run.config, run.state, run.config.train, journal.clock
    batches = _batches(run)
    profiler = Profiler(run.directory, train.profile_step, run.engine.rank)
    while state.step < train.steps:
        profiler.before(state.step + 1)
        started = time.perf_counter()
        lr = set_lr(run.engine.optimizer, lr_factor(state.step, train.steps, config.schedule))
        with clock.part("data"):
            batch = next(batches)
        run.engine.model.train()
        result = train_step(run.engine, config, run.spec.schedule, run.spec.mask_id, batch, state.step, clock)
        if run.ema is not None:
            with clock.part("optimizer"):
                run.ema.update(run.engine)
        journal.count(result, started)
        if (trace := profiler.after(state.step)) is not None:
            logger.info("wrote %s", trace)
        last = state.step == train.steps
        if state.step % train.log_every == 0 or last:
            journal.log_step(result, lr)
        validated = None
        if train.validate_every and (state.step % train.validate_every == 0 or last):
            with journal.paused():
                validated = _validate(run, journal)
        # Every rank must see the same answer at the same step, whichever of them got the signal.
        stopped_by = largest(stop.signal or 0)
        if state.step % train.checkpoint_every == 0 or last or stopped_by:
            with clock.part("checkpoint"):
                _save(run, saver, validated, wait=bool(last or stopped_by))
        if stopped_by:
            _leave(stopped_by, f"at step {state.step}")


def _leave(number: int, when: str) -> NoReturn:
    logger.info("stopped by %s %s; the same command goes on", signal.Signals(number).name, when)
    raise SystemExit(REQUEUE_EXIT)


def _batches(run: Run) -> Iterator[Sequences]:
    """This rank's share of each global batch, for ever, epoch after epoch; keeps the loader's position in the state."""
    config = run.config
    loader = build_loader(
        run.data,
        config.data.train_split,
        batch_size=config.train.global_batch_size // run.engine.data_size,
        replication=run.engine.world_size // run.engine.data_size,
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
        yield to_device(batch, run.manifest, run.engine.device, labels=config.model.labels)


def _validate(run: Run, journal: Journal) -> float:
    """Measure and log the NELBO of the averaged weights; returns the one that the model is meant for."""
    with run.ema.applied(run.engine) if run.ema is not None else contextlib.nullcontext():
        measure = partial(validation_nelbo, run.engine, run.config, run.spec, run.data, alive=run.watchdog.beat)
        null = measure(condition=False)
        conditioned = None
        if run.spec.model.self_conditioned:
            conditioned = measure(condition=True)
    journal.log_validation(null, conditioned)
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
