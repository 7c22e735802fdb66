"""Samplers of a model of blocks with a cache of finished blocks, compared with whole evaluations of its sequences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.timing import CLOCK, interleave, ratios, show_figures
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import Samples, sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights

_MODEL = DiTConfig(width=256, layers=4, heads=4, condition_width=32, self_conditioned=True)
_VOCAB, _LENGTH, _BLOCK, _STEPS = 4_096, 1024, 32, 64
_ROUNDS = 3


def main() -> None:
    """Print how many times faster caches are at L = 1,024, with two greedy steps for each block of 32 tokens."""
    device = resolve_device("auto")
    model = make_model(device)
    with compute_context(device, resolve_precision("auto", device)):
        for carry in (False, True):
            for caches in (("blocks",), ("prefix", "dual")):
                compare(model, caches, carry=carry, device=device)


def make_model(device: torch.device, config: DiTConfig = _MODEL, vocab: int = _VOCAB) -> DiT:
    """Make a model whose weights are not zero, so that tokens depend on all that is computed."""
    model = DiT(config, vocab_size=vocab, mask_id=vocab - 1, schedule=LogLinear())
    init_weights(model, 0)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=dice), alpha=0.05)
    return model.to(device).eval()


def compare(model: DiT, caches: Sequence[str], *, carry: bool, device: torch.device) -> None:
    """Compare samplers with caches, all of models of blocks or all of other models, with the one without."""
    plain = SamplerSettings(kind="confidence", temperature=0.0, steps=_STEPS, block_length=_BLOCK, carry=carry)
    if "blocks" in caches:
        model.block_length, plain = _BLOCK, replace(plain, model_of_blocks=True)
    drawn: dict[str, Samples] = {}

    def run(cache: str) -> None:
        start = torch.full((1, _LENGTH), _VOCAB - 1, device=device)
        drawn[cache] = sample(
            model,
            start,
            torch.zeros(1, dtype=torch.int64, device=device),
            schedule=LogLinear(),
            settings=replace(plain, cache=cache),
            mask_id=_VOCAB - 1,
            seed=0,
        )

    timings = interleave({cache: partial(run, cache) for cache in ("none", *caches)}, warmup=0, rounds=_ROUNDS)
    model.block_length = None
    found = {cache: ratios(timings, cache)["none"] for cache in caches}
    positions = {cache: int(own.positions_B[0]) for cache, own in drawn.items()}
    assert all(own.evaluations == _STEPS for own in drawn.values())
    equal = {cache: float((drawn[cache].tokens == drawn["none"].tokens).double().mean()) for cache in caches}
    kind = "self-conditioned" if carry else "vanilla"
    show_figures(
        f"cache {' '.join(caches)}, {kind}, {_STEPS} steps, blocks of {_BLOCK} (V = {_VOCAB}, L = {_LENGTH}, B = 1) "
        f"[{CLOCK} time]",
        {
            cache: f"{statistics.median(times):6.1f} x faster than none {[round(x, 1) for x in times]}, "
            f"{positions[cache]:,} of {positions['none']:,} token positions, {equal[cache]:.1%} equal tokens"
            for cache, times in found.items()
        },
        {
            "times faster": found,
            "seconds": {name: timing.of(CLOCK) for name, timing in timings.items()},
            "positions": positions,
            "equal tokens": equal,
        },
    )
