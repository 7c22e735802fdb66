"""Stall of training while a checkpoint is saved, synchronously and asynchronously, and bytes that are hashed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.timing import interleave, show
from scmdm.checkpoint.model_verification import Verification, first_problem
from scmdm.checkpoint.reader import list_checkpoints
from scmdm.checkpoint.train_state import TrainState
from scmdm.checkpoint.writer import CheckpointWriter, snapshot
from scmdm.config.run import RunConfig
from scmdm.config.training import EmaConfig, TrainConfig
from scmdm.data.manifest import Manifest, TokenizerRef
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import resolve_device
from scmdm.models.dit import DiTConfig
from scmdm.models.model_files import ModelSpec
from scmdm.models.network import count_parameters
from scmdm.system.hashing import COUNTS
from scmdm.training.setup import build_engine

_MODEL = DiTConfig(width=512, layers=8, heads=8, condition_width=128)


def main() -> None:
    """Print the stall of both kinds of save (weights, averages and two moments in float32), and the bytes hashed."""
    device = resolve_device("auto")
    config = RunConfig(model=_MODEL, engine="single")
    spec = ModelSpec(_MODEL, config.diffusion, 4096, 4095, 128)
    engine = build_engine(config, spec, None, device, torch.float32)
    ema, state = Ema(engine, EmaConfig()), TrainState()
    with tempfile.TemporaryDirectory(dir=".") as name:
        directory = Path(name)
        tokenizer = directory / "tokenizer.json"
        tokenizer.write_text("{}")
        reference = TokenizerRef("characters", tokenizer.name, "")
        manifest = Manifest(2, "none", reference, 4096, 4095, 0, 1, 2, 128, "uint16", "loss", "given", {})
        writers = {
            kind: CheckpointWriter(directory / kind, engine, _train(kind)) for kind in ("synchronous", "asynchronous")
        }

        def save(kind: str) -> None:
            state.step += 1
            writers[kind].save(snapshot(engine, ema, state, spec, manifest, tokenizer, ""))

        timings = interleave(
            {kind: lambda kind=kind: save(kind) for kind in writers},  # type: ignore[misc]
            after=writers["asynchronous"].finish,
        )
        writers["synchronous"].finish()
        _show_bytes("save", lambda: save("synchronous"))
        newest = list_checkpoints(directory / "synchronous")[-1]
        _show_bytes("open for a resume", lambda: first_problem(newest))
        _show_bytes("open as a base", lambda: first_problem(newest, Verification("share", weights="ema")))
    size = 4 * 4 * count_parameters(engine.model) / 2**20
    show(f"stall of training during a save of {size:.0f} MiB", timings, "synchronous", clock="wall")


def _show_bytes(name: str, call: Callable[[], object]) -> None:
    before, started = replace(COUNTS), time.perf_counter()
    call()
    read, written = COUNTS.read - before.read, COUNTS.written - before.written
    seconds = time.perf_counter() - started
    print(f"{name:<18} hashes {written / 2**20:6.1f} MiB written, {read / 2**20:6.1f} MiB read, {seconds:.2f} s")


def _train(kind: str) -> TrainConfig:
    return TrainConfig(steps=1, async_checkpoint=kind == "asynchronous", keep_last=1)
