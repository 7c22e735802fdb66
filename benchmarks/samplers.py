"""Samplers compared with the dense baseline, on the same weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.baselines.dense import DenseDenoiser, sample_dense
from benchmarks.timing import CLOCK, Timing, interleave, ratios, show_figures
from scmdm.diffusion.guidance import SamplingDenoiser
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.ops.cuda_graphs import ReplayedDenoiser

_MODEL = DiTConfig(width=256, layers=4, heads=4, condition_width=64, self_conditioned=True)
_VOCAB, _LENGTH, _BATCH = 50_258, 256, 1
_BASELINE_STEPS = 1  # timed steps; all steps do the same work


def main() -> None:
    """Print the speed-up over the dense sampler, whose time is extrapolated from one step."""
    _run({32: 3, 128: 1})


def thousand() -> None:
    """Print the speed-up for 1,024 steps; this takes some minutes."""
    _run({1024: 1})


def _run(rounds: Mapping[int, int]) -> None:
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    model = DiT(_MODEL, vocab_size=_VOCAB, mask_id=_VOCAB - 1, schedule=LogLinear()).to(device).eval()
    init_weights(model, 0)
    with compute_context(device, dtype):
        for steps, number in rounds.items():
            _compare(model, steps, number, device)


def _compare(model: DiT, steps: int, rounds: int, device: torch.device) -> None:
    replayed: SamplingDenoiser = ReplayedDenoiser(model) if device.type == "cuda" else model
    functions: dict[str, Callable[[], object]] = {
        "dense vanilla": lambda: _dense(model, steps, carry=False, device=device),
        "dense self-conditioned": lambda: _dense(model, steps, carry=True, device=device),
        "vanilla": lambda: _ours(model, steps, carry=False, device=device),
        "self-conditioned": lambda: _ours(model, steps, carry=True, device=device),
    }
    if device.type == "cuda":
        functions["self-conditioned, CUDA graphs"] = lambda: _ours(replayed, steps, carry=True, device=device)
    timings = interleave(functions, warmup=0, rounds=rounds)
    for name in ("dense vanilla", "dense self-conditioned"):
        whole = [[x * steps / _BASELINE_STEPS for x in timings[name].of(clock)] for clock in ("wall", "cpu")]
        timings[name] = Timing(*whole)
    ours = [name for name in functions if not name.startswith("dense")]
    found = {name: ratios(timings, name)[f"dense {name.split(',')[0]}"] for name in ours}
    show_figures(
        f"sampler, T = {steps} (V = {_VOCAB}, L = {_LENGTH}, B = {_BATCH}) [{CLOCK} time]",
        {
            name: f"{statistics.median(times):6.1f} x faster than dense {[round(x, 1) for x in times]}, "
            f"{statistics.median(timings[name].of(CLOCK)):.1f} s"
            for name, times in found.items()
        },
        {"times faster": found, "seconds": {name: timing.of(CLOCK) for name, timing in timings.items()}},
    )


def _ours(model: SamplingDenoiser, steps: int, *, carry: bool, device: torch.device) -> Tensor:
    start, ids = _start(device), torch.arange(_BATCH, device=device)
    settings = SamplerSettings(steps=steps, carry=carry)
    return sample(model, start, ids, schedule=LogLinear(), settings=settings, mask_id=_VOCAB - 1, seed=0).tokens


def _dense(model: DiT, steps: int, *, carry: bool, device: torch.device) -> Tensor:
    dense = DenseDenoiser(model)
    return sample_dense(
        dense.log_probabilities,
        dense.embed,
        _start(device),
        LogLinear(),
        steps,
        mask_id=model.mask_id,
        carry=carry,
        generator=torch.Generator(device).manual_seed(0),
        only=_BASELINE_STEPS,
    )


def _start(device: torch.device) -> Tensor:
    return torch.full((_BATCH, _LENGTH), _VOCAB - 1, device=device)
