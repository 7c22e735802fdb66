"""Stall of training while a checkpoint is saved, synchronously and asynchronously."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.timing import interleave, show
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
from scmdm.training.setup import build_engine

_MODEL = DiTConfig(width=512, layers=8, heads=8, condition_width=128)


def main() -> None:
    """Print the stall of both kinds of save: weights, averages and two moments in float32."""
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
    size = 4 * 4 * count_parameters(engine.model) / 2**20
    show(f"stall of training during a save of {size:.0f} MiB", timings, "synchronous", clock="wall")


def _train(kind: str) -> TrainConfig:
    return TrainConfig(steps=1, async_checkpoint=kind == "asynchronous", keep_last=1)
