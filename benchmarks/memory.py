"""Peak memory of a vanilla training step, compared with the dense baseline, each in its own process."""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import replace

import torch

from benchmarks.baselines.dense import DenseDenoiser
from benchmarks.step import TEXT, Shape, make_engine_step
from benchmarks.timing import show_figures
from scmdm.models.dit import DiTConfig

_BATCHES = (4, 8)
_TINY = DiTConfig(width=16, layers=1, heads=1)


def main() -> None:
    """Print the memory that each step adds to a process that has trained a tiny model."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        mib = {batch: [pool.apply(peak, (batch, dense)) for dense in (True, False)] for batch in _BATCHES}
    figures = {
        f"B = {batch}": f"{ours:.0f} MiB, dense {dense:.0f}: {ours / dense:.2f}" for batch, (dense, ours) in mib.items()
    }
    show_figures(f"peak memory of a vanilla step (V = {TEXT.vocab}, L = {TEXT.length})", figures, {"mib": mib})


def peak(batch: int, dense: bool) -> float:
    """Measure the MiB that two steps add to two steps of a tiny model, which load the libraries."""
    torch.set_num_threads(1)
    _two_steps(replace(TEXT, model=_TINY, vocab=128, length=16, batch=1), dense)
    before = _peak()
    _two_steps(replace(TEXT, batch=batch), dense)
    return _peak() - before


def _two_steps(shape: Shape, dense: bool) -> None:
    engine, step = make_engine_step(shape, rate=0.0)
    if dense:
        engine.denoiser = DenseDenoiser(engine.model)
    step()
    step()


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
