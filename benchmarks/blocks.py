"""Samplers of a model of blocks with a cache of finished blocks, compared with whole evaluations of its sequences."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.timing import CLOCK, interleave, ratios, show_figures
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import Samples, sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights

_MODEL = DiTConfig(width=128, layers=4, heads=4, condition_width=32, self_conditioned=True)
_VOCAB, _LENGTH, _BLOCK, _STEPS = 4_096, 1024, 32, 64
_ROUNDS = 3


def main() -> None:
    """Print how many times faster a cache is at L = 1,024, with two steps for each block of 32 tokens."""
    device = resolve_device("auto")
    model = DiT(_MODEL, vocab_size=_VOCAB, mask_id=_VOCAB - 1, schedule=LogLinear()).to(device).eval()
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # none stays zero, so that tokens depend on all that is computed
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    with compute_context(device, resolve_precision("auto", device)):
        for carry in (False, True):
            _compare(model, carry=carry, device=device)


def _compare(model: DiT, *, carry: bool, device: torch.device) -> None:
    settings = SamplerSettings(kind="confidence", steps=_STEPS, block_length=_BLOCK, carry=carry)
    of_blocks = replace(settings, model_of_blocks=True)
    variants = {
        "blocks": (_BLOCK, replace(of_blocks, cache="blocks")),
        "blocks, no cache": (_BLOCK, of_blocks),
        "prefix": (None, replace(settings, cache="prefix")),
        "dual": (None, replace(settings, cache="dual")),
        "no blocks, no cache": (None, settings),
    }
    drawn: dict[str, Samples] = {}

    def run(name: str) -> Callable[[], None]:
        def draw() -> None:
            model.block_length, own = variants[name]
            start = torch.full((1, _LENGTH), _VOCAB - 1, device=device)
            ids = torch.zeros(1, dtype=torch.int64, device=device)
            keys = {"schedule": LogLinear(), "settings": own, "mask_id": _VOCAB - 1, "seed": 0}
            drawn[name] = sample(model, start, ids, **keys)  # type: ignore[arg-type]

        return draw

    timings = interleave({name: run(name) for name in variants}, warmup=0, rounds=_ROUNDS)
    assert drawn["blocks"].evaluations == drawn["blocks, no cache"].evaluations == _STEPS
    found = {}
    for name in ("blocks", "prefix", "dual"):
        plain = "blocks, no cache" if name == "blocks" else "no blocks, no cache"
        found[name] = ratios(timings, name)[plain]
    equal = bool((drawn["blocks"].tokens == drawn["blocks, no cache"].tokens).all())
    positions = {name: int(own.positions_B[0]) for name, own in drawn.items()}
    kind = "self-conditioned" if carry else "vanilla"
    show_figures(
        f"cache of blocks of {_BLOCK}, {kind}, {_STEPS} steps (V = {_VOCAB}, L = {_LENGTH}, B = 1) [{CLOCK} time]",
        {
            name: f"{statistics.median(times):6.1f} x faster than none {[round(x, 1) for x in times]}, "
            f"{positions[name]:,} token positions" + (f", equal tokens: {equal}" if name == "blocks" else "")
            for name, times in found.items()
        },
        {
            "times faster": found,
            "seconds": {name: timing.of(CLOCK) for name, timing in timings.items()},
            "positions": positions,
            "equal": equal,
        },
    )
