"""The most memory of a vanilla training step: ours against the dense baseline, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
from dataclasses import replace

import torch

from benchmarks.baselines.dense import DenseDenoiser
from benchmarks.step import TEXT, make_engine_step
from benchmarks.timing import show_figures

_BATCHES = (4, 8)


def main() -> None:
    """Print what each adds to a process that has imported everything: weights, gradients, moments, activations."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        mib = {batch: [pool.apply(peak, (batch, dense)) for dense in (True, False)] for batch in _BATCHES}
    figures = {
        f"B = {batch}": f"{ours:.0f} MiB, dense {dense:.0f}: {ours / dense:.2f}" for batch, (dense, ours) in mib.items()
    }
    show_figures(f"peak memory of a vanilla step (V = {TEXT.vocab}, L = {TEXT.length})", figures, {"mib": mib})


def peak(batch: int, dense: bool) -> float:
    """MiB of two steps."""
    torch.set_num_threads(1)
    before = _peak()
    engine, step = make_engine_step(replace(TEXT, batch=batch), rate=0.0)
    if dense:
        engine.denoiser = DenseDenoiser(engine.model)
    step()
    step()
    return _peak() - before


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
