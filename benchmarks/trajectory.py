"""`python -m benchmarks trajectory LABEL=MODEL ... --data DIRECTORY --out DIRECTORY`: how models denoise, step by step.

For each model, over the time t of the denoiser's input:

- the integrand of the NELBO on held-out sequences, without an estimate and, for a self-conditioned model, conditioned
  on the estimate of one pass;
- in its samples, at the positions that stay masked: the entropy of the prediction, and how often its most probable
  token is the one that the position receives in the end.

Writes `trajectory.json` and `trajectory.png`.

Legend: B batch, L length, N masked positions, S steps, V vocabulary with the mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from scmdm.config.sampling import SamplerConfig
from scmdm.data.manifest import Manifest
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.sampler import Observation
from scmdm.distributed.engine import compute_context, resolve_precision
from scmdm.domains.plotting import COLOURS, MARKERS, STYLE, save_figure
from scmdm.models.model_files import LoadedModel
from scmdm.sampling.generation import generate
from scmdm.sampling.model_loading import load
from scmdm.system.files import atomic_write_text, json_text
from scmdm.training.validation import ValidationSet

_BATCH = 256
_TIMES = tuple(step / 16 for step in range(1, 17))


@dataclass(frozen=True)
class Denoising:
    """Means over sequences or samples, by time."""

    t: list[float]
    null: list[float]  # integrand of the NELBO, nats per token
    conditioned: list[float]  # empty for a model without self-conditioning
    t_sampled: list[float]
    entropy: list[float]  # nats per masked position
    settled: list[float]  # share of masked positions whose most probable token is that of the finished sample


@dataclass
class _Recorder:
    """Entropy and most probable tokens at the positions that stay masked after each step of one batch."""

    mask_id: int
    t: list[float] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)  # (N,) float32 of each step
    masked: list[Tensor] = field(default_factory=list)  # (B, L) bool of each step
    guess: list[Tensor] = field(default_factory=list)  # (N,) int64 of each step

    def __call__(self, step: Observation) -> None:
        masked_BL = step.z_BL == self.mask_id
        if not bool(masked_BL.any()):
            return
        logits_NV = step.logits(masked_BL).float()
        self.t.append(float(step.t_B[0]))
        self.entropy.append(torch.special.entr(logits_NV.softmax(1)).sum(1))
        self.masked.append(masked_BL)
        self.guess.append(logits_NV.argmax(1))


def main(arguments: Sequence[str]) -> int:
    """Measure the models that the arguments name, and write the figure; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks trajectory")
    parser.add_argument("models", nargs="+", metavar="LABEL=MODEL")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set with the split `test`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--num", type=int, default=256, help="samples, and held-out sequences for each time")
    found = parser.parse_args(arguments)
    paths = dict[str, str]()
    for named in found.models:
        label, _, path = named.partition("=")
        if not (label and path) or label in paths:
            parser.error(
                f"LABEL=MODEL: {named!r} is not possible; give each model a label of its own, as in base=runs/base"
            )
        paths[label] = path
    measured = {
        label: measure(load(Path(path)), found.data, steps=found.steps, num=found.num) for label, path in paths.items()
    }
    record = {"models": paths, "steps": found.steps, "num": found.num}
    curves = {label: asdict(denoising) for label, denoising in measured.items()}
    found.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(found.out / "trajectory.json", json_text({**record, "curves": curves}, indent=1))
    print(draw(measured, found.out / "trajectory.png"))
    return 0


def measure(loaded: LoadedModel, data: Path, *, steps: int, num: int) -> Denoising:
    """Measure a model on held-out sequences and in its samples."""
    null = integrand(loaded, data, num=num, condition=False)
    conditioned = integrand(loaded, data, num=num, condition=True) if loaded.spec.model.self_conditioned else []
    return Denoising(list(_TIMES), null, conditioned, *follow(loaded, steps=steps, num=num))


@torch.no_grad()
def integrand(loaded: LoadedModel, data: Path, *, num: int, condition: bool) -> list[float]:
    """Return the integrand of the NELBO at each of `_TIMES`, nats per valid token."""
    spec, device = loaded.spec, next(loaded.model.parameters()).device
    held_out = ValidationSet.at(data, "test", Manifest.read(data), num)
    found = []
    for index, t in enumerate(_TIMES):
        nats, tokens = 0.0, 0
        for batch in held_out.batches(device, size=_BATCH, labels=spec.model.labels):
            t_B = torch.full((len(batch),), t, dtype=torch.float64, device=device)
            noised = noise_batch(
                batch,
                t_B,
                schedule=spec.schedule,
                mask_id=spec.mask_id,
                seed=0,
                step=index,
                rate=float(condition),
            )
            with compute_context(device, resolve_precision("auto", device)):
                output = self_conditioned_nelbo(loaded.model, noised, spec.schedule, condition=condition)
            nats, tokens = nats + float(output.weighted_nll_B.sum()), tokens + int(batch.valid.sum())
        found.append(nats / tokens)
    return found


def follow(loaded: LoadedModel, *, steps: int, num: int) -> tuple[list[float], list[float], list[float]]:
    """Draw samples; return, for each step that leaves masks, its time, entropy and share of settled positions."""
    recorder = _Recorder(loaded.spec.mask_id)
    sampler = SamplerConfig(steps=steps)
    drawn = generate(loaded, sampler, num=num, seed=0, batch_size=num, on_step=recorder)
    final_BL = drawn.tokens.to(recorder.masked[0].device)
    settled = [
        float((guess_N == final_BL[masked_BL]).float().mean())
        for guess_N, masked_BL in zip(recorder.guess, recorder.masked, strict=True)
    ]
    return recorder.t, [float(entropy_N.mean()) for entropy_N in recorder.entropy], settled


def draw(measured: Mapping[str, Denoising], path: Path) -> Path:
    """Draw the three curves of each model side by side."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(16, 4.6))
        for index, (label, found) in enumerate(measured.items()):
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "lw": 1.8}
            marked = style | {"marker": MARKERS[index % len(MARKERS)], "ms": 4}
            axes[0].plot(found.t, found.null, **marked, ls=":" if found.conditioned else "-", label=f"{label}, null")
            if found.conditioned:
                axes[0].plot(found.t, found.conditioned, **marked, label=f"{label}, conditioned")
            axes[1].plot(found.t_sampled, found.entropy, **style, label=label)
            axes[2].plot(found.t_sampled, found.settled, **style, label=label)
        axes[0].set(title="NELBO integrand, held out", ylabel="nats per token")
        axes[1].set(title="entropy at masked positions, sampled", ylabel="nats")
        axes[2].set(title="masked positions whose guess is final", ylabel="share")
        for ax in axes:
            ax.set(xlabel="t (sampling goes from 1 to 0)", xlim=(1, 0))
            ax.legend(fontsize=9)
        figure.tight_layout()
        return save_figure(figure, path)
