"""Overhead of FSDP2 with one rank, compared with the single engine."""

from __future__ import annotations

import torch

from benchmarks.step import QM9, make_engine_step
from benchmarks.timing import interleave, show
from scmdm.distributed.engine import resolve_device
from scmdm.system.process_group import World, process_group


def main() -> None:
    """Print the ratios for a vanilla and an adaptation step."""
    device = resolve_device("auto")
    with process_group(World(0, 1, 0), device, needed=True):
        for name, rate in (("vanilla step (rate 0)", 0.0), ("adaptation step (rate 1)", 1.0)):
            steps = {
                "single": make_engine_step(QM9, rate=rate)[1],
                "fsdp2, one rank": make_engine_step(QM9, rate=rate, engine="fsdp2")[1],
            }
            show(f"engines: {name}, {torch.get_num_threads()} threads", interleave(steps), "single")
