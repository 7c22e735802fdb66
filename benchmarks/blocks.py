"""Samplers with caches of keys and values, compared with whole evaluations of the sequences: speed and quality."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import CLOCK, interleave, ratios, show_figures
from scmdm.diffusion.likelihood import nelbo_of, nelbo_terms
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import Samples, sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences
from scmdm.distributed.engine import compute_context, resolve_device, resolve_precision
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.sampling.model_loading import load

_MODEL = DiTConfig(width=256, layers=4, heads=4, condition_width=32, self_conditioned=True)
_VOCAB, _LENGTH, _BLOCK, _STEPS = 4_096, 1024, 32, 64
_ROUNDS = 3


@dataclass(frozen=True)
class _Trained:
    """A shipped model, and how its sequences are divided into blocks."""

    path: Path
    block: int
    steps: int
    samples: int


_CONFIGS = Path(__file__).parents[1] / "configs"
_TRAINED = (
    _Trained(_CONFIGS / "text/base-model", block=16, steps=32, samples=32),  # L = 128
    _Trained(_CONFIGS / "qm9/long-base", block=8, steps=16, samples=256),  # L = 32
    _Trained(_CONFIGS / "qm9/long-scmdm", block=8, steps=16, samples=256),
)
_DRAWS = 8  # masked states of each sample, for its NELBO


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


def quality() -> None:
    """Print what approximate caches do to the samples of trained models, which draw their tokens."""
    for trained in _TRAINED:
        compare_quality(trained)


def compare_quality(trained: _Trained) -> None:
    """Compare samples with approximate caches with those without: equal tokens, deviation, NELBO, and time."""
    loaded = load(trained.path)
    spec, device = loaded.spec, next(loaded.model.parameters()).device
    carry = spec.model.self_conditioned
    plain = SamplerSettings(kind="confidence", steps=trained.steps, block_length=trained.block, carry=carry)
    ids = torch.arange(trained.samples, device=device)
    start = torch.full((trained.samples, spec.length), spec.mask_id, device=device)
    start[:, 0] = loaded.tokenizer.bos_id
    keys: dict[str, Any] = {"schedule": spec.schedule, "mask_id": spec.mask_id, "seed": 0}

    def run(settings: SamplerSettings) -> Samples:
        return sample(loaded.model, start, ids, settings=settings, **keys)

    settings = {cache: replace(plain, cache=cache) for cache in ("none", "prefix", "dual")}
    timings = interleave({cache: partial(run, own) for cache, own in settings.items()}, warmup=0, rounds=1)
    times = ratios(timings, "none")
    drawn = {cache: run(replace(own, cache_check=1)) for cache, own in settings.items()}
    figures, shown = {}, {}
    for cache, own in drawn.items():
        batch = Sequences(own.tokens, start == spec.mask_id, ids)
        terms = nelbo_terms(loaded.model, [batch], t_min=spec.diffusion.t_min, draws=_DRAWS, condition=carry, **keys)
        nelbo, equal = nelbo_of(terms), float((own.tokens == drawn["none"].tokens)[:, 1:].double().mean())
        figures[cache] = {"nelbo": nelbo.mean, "stderr": nelbo.stderr, "equal tokens": equal, **vars(own.deviation)}
        figures[cache] |= {"times faster": 1 / times[cache][0], "positions": int(own.positions_B[0])}
        measured = own.deviation.describe() if own.deviation.positions else ""
        shown[cache] = (
            f"{1 / times[cache][0]:5.2f} x faster, {int(own.positions_B[0]):,} token positions, {equal:.1%} equal "
            f"tokens, NELBO {nelbo.mean:.3f} +- {nelbo.stderr:.3f} nats; {measured}"
        )
    place = trained.path.relative_to(_CONFIGS)
    title = f"samples of {place} with approximate caches, {trained.steps} steps, blocks of {trained.block}"
    show_figures(f"{title} (L = {spec.length}, {trained.samples} samples) [{CLOCK} time]", shown, figures)
