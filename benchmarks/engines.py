"""What FSDP2 costs where there is nothing to shard: one rank of it against the single engine."""

from __future__ import annotations

import functools

import torch

from benchmarks.step import make_step
from benchmarks.timing import interleave, show
from scmdm.config.schema import ModelConfig
from scmdm.parallel.engine import resolve_device
from scmdm.parallel.processes import World, process_group


def main() -> None:
    """Print the ratios for a vanilla and an adaptation step."""
    device = resolve_device("auto")
    with process_group(World(0, 1, 0), device, needed=True):
        make = functools.partial(make_step, ModelConfig(), 34, 32, 256)
        for name, rate in (("vanilla step (rate 0)", 0.0), ("adaptation step (rate 1)", 1.0)):
            steps = {"single": make(rate=rate), "fsdp2, one rank": make(rate=rate, engine="fsdp2")}
            show(f"{name}, V = 34, L = 32, {torch.get_num_threads()} threads", interleave(steps), "single")
