"""Loading of a model for sampling and evaluation, whole on each rank or shared by several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch

from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import find_model
from scmdm.checkpoint.seal import sha256_of_model
from scmdm.config.common import resolve_weights_dtype
from scmdm.distributed.engine import resolve_device, resolve_precision
from scmdm.distributed.sharded_evaluation import ShardedEvaluations, shard_for_evaluation
from scmdm.models.compilation import check_compiler, compile_model
from scmdm.models.model_files import (
    LoadedModel,
    allocate,
    fill_weights,
    match_weights,
    open_model,
    read_model,
    set_dtype,
)
from scmdm.runtime.divided_work import ResultParts
from scmdm.runtime.flight_recorder import enable_flight_recorder
from scmdm.system.process_group import current_world, joined_world, process_group

# Longest duration of a collective once its last rank has arrived. Ranks that share weights wait for each other's
# evaluations alone, each of which must be shorter than this.
LONGEST_COLLECTIVE = timedelta(minutes=30)


def load(
    path: str | Path,
    *,
    weights: str = "ema",
    device: str = "auto",
    weights_dtype: str = "float32",
    precision: str = "auto",
    shards: int = 1,
    verify: str = "share",
    compile: str = "none",
) -> LoadedModel:
    """Load a model for sampling from a run directory, a checkpoint or an export, in eval mode on `device`.

    `weights` is "ema" (averaged, where the model has them) or "raw"; `device` is "auto", "cpu" or "cuda";
    `weights_dtype`, in which weights are held, is "float32" or "bfloat16". With `shards` above 1, that many ranks share
    the weights, and evaluate in `precision`. `verify` is "share" (what is used is hashed, divided over the ranks of a
    job), "full" (every file is hashed) or "sizes". `compile` is "none" or, for a model that is not shared, "block".
    Raises UserError when there is no model at `path`, or when its files are missing, damaged or inconsistent.
    """
    directory = find_model(Path(path), Verification(verify, weights=weights, together=True))
    place = rank_device(device)
    dtype = resolve_precision(weights_dtype, place)
    if shards == 1:
        check_compiler("compile", compile, place)
        loaded = read_model(directory, weights=weights, device=place, dtype=dtype)
        compile_model(loaded.model, compile)
        return loaded
    stored = open_model(directory)
    model = stored.spec.build()
    set_dtype(model, dtype)
    group = shard_for_evaluation(model, shards, place)
    found = match_weights(model, directory, weights=weights)
    allocate(model, place)
    fill_weights(model, found)
    joint = ShardedEvaluations(model.eval(), group, place, resolve_precision(precision, place))
    return LoadedModel(**vars(stored), model=model, joint=joint)


class ModelKeys(Protocol):
    """Keys of a configuration that say how a model is loaded, and on what it is evaluated."""

    weights: str
    device: str
    precision: str
    weights_dtype: str
    shards: int
    compile: str
    threads: int
    verify: str


@contextmanager
def evaluation_ranks(config: ModelKeys) -> Iterator[None]:
    """Join the ranks that the launcher has started, if there are several, while the block runs."""
    if config.threads:
        torch.set_num_threads(config.threads)
    world = current_world()
    device = resolve_device(config.device, world.local_rank)
    enable_flight_recorder()
    with process_group(world, device, needed=False, timeout=LONGEST_COLLECTIVE, heartbeat=True):
        yield


def load_as_configured(path: Path, config: ModelKeys) -> LoadedModel:
    """Load the model at `path` for a command."""
    return load(
        path,
        weights=config.weights,
        device=config.device,
        weights_dtype=config.weights_dtype,
        precision=resolve_weights_dtype(config.weights_dtype, config.precision),
        shards=config.shards,
        verify=config.verify,
        compile=config.compile,
    )


def parts_beside(out: Path, loaded: LoadedModel, config: ModelKeys) -> ResultParts:
    """Return the parts of results of a model whose output is the file `out`."""
    model = {name: getattr(config, name) for name in ("weights", "weights_dtype", "compile")}
    return ResultParts.beside(out, model=sha256_of_model(loaded.path), **model)


def rank_device(name: str) -> torch.device:
    """Return the device for `name`, of this rank in a job of several. Raises UserError if it does not exist."""
    return resolve_device(name, current_world().local_rank if joined_world()[1] > 1 else 0)
