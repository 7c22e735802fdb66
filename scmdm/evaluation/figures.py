"""Figures of a run and of a study, as PNG files. The same arm has the same colour and marker everywhere."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from scipy.stats import wasserstein_distance

from scmdm.domains.genomes.spectra import Spectrum
from scmdm.evaluation.statistics import Interval
from scmdm.system.files import atomic_write_bytes

# Okabe and Ito's palette: tells apart for all common kinds of colour blindness.
COLOURS = ("#555555", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 12,
    "legend.frameon": False,
}
Row = Mapping[str, float]


@dataclass(frozen=True)
class Panel:
    """One quantity against T: intervals by arm and T."""

    title: str
    values: Mapping[str, Mapping[int, Interval]]
    better: str  # "higher" or "lower"
    scale: float = 1.0
    real: float | None = None  # of real data
    most: float | None = None  # that is possible


def quality_figure(panels: Sequence[Panel], path: Path) -> Path:
    """Quality against the number of denoiser evaluations, error bars 95 % over seeds."""
    with plt.rc_context(_STYLE):
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.7 * rows), squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(ax, panel)
        for ax in list(axes.flat)[len(panels) :]:
            ax.axis("off")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels))
        figure.tight_layout(rect=(0, 0.1 / rows, 1, 1))
        return _save(figure, path)


def _draw_panel(ax: Axes, panel: Panel) -> None:
    arms = list(panel.values)
    ticks = sorted({steps for by_steps in panel.values.values() for steps in by_steps})
    for index, arm in enumerate(arms):
        steps = sorted(panel.values[arm])
        # A few per cent apart, so that error bars of different arms do not hide each other.
        x = np.array(steps) * 1.035 ** (index - (len(arms) - 1) / 2)
        found = [panel.values[arm][t] for t in steps]
        y = [interval.mean * panel.scale for interval in found]
        error = [0.0 if np.isnan(i.half_width) else i.half_width * panel.scale for i in found]
        ax.errorbar(
            x,
            y,
            yerr=error,
            label=arm,
            color=COLOURS[index % 7],
            marker=MARKERS[index % 7],
            capsize=3,
            markersize=5,
            lw=1.6,
        )
    if panel.real is not None:
        ax.axhline(panel.real * panel.scale, color=COLOURS[0], ls=":", lw=1.2)
    _limit(ax, panel)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(tick) for tick in ticks])
    ax.set_xlabel("denoiser evaluations (T)")
    ax.set_title(f"{panel.title} ({'↑' if panel.better == 'higher' else '↓'})")


def _limit(ax: Axes, panel: Panel) -> None:
    """An interval from two or three seeds may reach far beyond what is possible, and would flatten all else."""
    low, high = ax.get_ylim()
    means = [interval.mean for by_steps in panel.values.values() for interval in by_steps.values()]
    most = np.inf if panel.most is None else panel.most * panel.scale
    if min(means) >= 0:
        high = min(high, 1.05 * most)
        ax.set_ylim(max(low, -0.05 * high), high)


def arms_figure(panels: Sequence[Panel], steps: int, path: Path) -> Path:
    """Every arm at one T, a row each: mean and 95 % interval over seeds. The dashed line is the first arm's mean."""
    with plt.rc_context(_STYLE):
        arms = list(dict.fromkeys(arm for panel in panels for arm in panel.values))
        size = (2.6 + 3.2 * len(panels), 1.2 + 0.32 * len(arms))
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
        for ax, panel in zip(axes.flat, panels, strict=True):
            _draw_arms(ax, panel, arms, steps)
        axes.flat[0].set_yticks(range(len(arms)), arms)
        axes.flat[0].invert_yaxis()
        figure.suptitle(f"T = {steps}", fontsize=12)
        figure.tight_layout()
        return _save(figure, path)


def _draw_arms(ax: Axes, panel: Panel, arms: Sequence[str], steps: int) -> None:
    for row, arm in enumerate(arms):
        interval = panel.values.get(arm, {}).get(steps)
        if interval is None:
            continue
        mean, half = interval.mean * panel.scale, interval.half_width * panel.scale
        if row == 0:
            ax.axvline(mean, color=COLOURS[0], ls="--", lw=1)
        error = None if np.isnan(half) else half
        ax.errorbar(mean, row, xerr=error, fmt="o", color=COLOURS[0 if row == 0 else 6], capsize=3, markersize=5)
    # Short: the panels stand beside each other.
    ax.set_title(textwrap.fill(f"{panel.title} ({'↑' if panel.better == 'higher' else '↓'})", 26), fontsize=11)


def loss_figure(
    train: Mapping[str, Sequence[Row]], validation: Mapping[str, Sequence[Row]], path: Path, *, order: Sequence[str]
) -> Path:
    """Training loss (faint raw, solid smooth) and validation NELBO (dashed null, solid conditioned) against tokens."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
        for index, arm in enumerate(order):
            colour = COLOURS[index % 7]
            _draw_training(left, train.get(arm, []), arm, colour)
            _draw_validation(right, validation.get(arm, []), arm, colour, MARKERS[index % 7])
        losses = np.array([row["loss"] for rows in train.values() for row in rows])
        if len(losses) > 20:  # the first steps would squeeze all that follows
            left.set_ylim(*np.quantile(losses, [0, 0.98]) + np.array([-0.02, 0.02]) * np.ptp(losses))
        left.set(title="training loss", xlabel="tokens (million)", ylabel="nats per token")
        right.set(title="validation NELBO (averaged weights)", xlabel="tokens (million)", ylabel="nats per token")
        for ax in (left, right):
            if ax.get_legend_handles_labels()[1]:
                # Beneath: inside the axes it would hide a curve.
                ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        figure.tight_layout()
        return _save(figure, path)


def _draw_training(ax: Axes, rows: Sequence[Row], label: str, colour: str) -> None:
    if not rows:
        return
    x = np.array([row["tokens"] for row in rows]) / 1e6
    y = np.array([row["loss"] for row in rows])
    ax.plot(x, y, color=colour, alpha=0.25, lw=0.8)
    ax.plot(x, smooth(y), color=colour, lw=1.8, label=label)


def _draw_validation(ax: Axes, rows: Sequence[Row], label: str, colour: str, marker: str) -> None:
    for key, style, suffix in (("nelbo_null", "--", "null"), ("nelbo_conditioned", "-", "conditioned")):
        points = [(row["tokens"] / 1e6, row[key]) for row in rows if row.get(key) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), style, color=colour, marker=marker, ms=4, label=f"{label}, {suffix}")


def smooth(values: np.ndarray, fraction: float = 0.05) -> np.ndarray:
    """Centred moving mean over a fraction of the values, shorter at the ends."""
    half = max(1, int(len(values) * fraction / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def progress_figure(rows: Sequence[Row], path: Path) -> Path:
    """Learning rate, gradient norm and speed of one run."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
        for ax, (key, title) in zip(
            axes,
            (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_s", "tokens per second")),
            strict=True,
        ):
            ax.plot([row["step"] for row in rows], [row[key] for row in rows], color=COLOURS[6], lw=1.2)
            ax.set(title=title, xlabel="step")
        figure.tight_layout()
        return _save(figure, path)


def distribution_figure(
    sets: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, units: Mapping[str, str] | None = None
) -> Path:
    """Histograms of each property: the first set is the reference (filled), the others are lines,
    coloured as in the other figures.

    `sets` are values by property by name of the set, the same properties in each. The distance is the 1-Wasserstein
    distance from the reference, in the property's unit. What is outside the middle 99.8 % of the
    reference and of the others together is beyond the axes.
    """
    (reference, values), *others = sets.items()
    with plt.rc_context(_STYLE):
        columns = min(2, len(values))
        rows = -(-len(values) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3.9 * rows), squeeze=False)
        for ax, (name, values_N) in zip(axes.flat, values.items(), strict=False):
            edges = _edges([found[name] for found in sets.values()])
            ax.hist(values_N, edges, density=True, color="#cccccc", label=reference)
            for index, (label, found) in enumerate(others):
                distance = wasserstein_distance(found[name], values_N)
                ax.hist(
                    found[name],
                    edges,
                    density=True,
                    histtype="step",
                    lw=1.6,
                    color=COLOURS[index % 7],
                    label=f"{label}, distance {distance:.3g}",
                )
            ax.set(title=name, ylabel="density", xlabel=(units or {}).get(name, ""))
            ax.set_ylim(0, (1.1 + 0.11 * len(sets)) * ax.get_ylim()[1])  # room for the legend
            ax.legend(fontsize=9)
        for ax in list(axes.flat)[len(values) :]:
            ax.axis("off")
        figure.tight_layout()
        return _save(figure, path)


def _edges(values: Sequence[np.ndarray]) -> np.ndarray:
    bins = int(np.clip(2 * min(map(len, values)) ** (1 / 3), 5, 60))  # Rice's rule
    low, high = np.quantile(np.concatenate(values), [0.001, 0.999])
    return np.linspace(low, high if high > low else low + 1.0, bins + 1)


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    atomic_write_bytes(path, buffer.getvalue())
    return path


def genome_figure(reference: Spectrum, arms: Mapping[str, Spectrum], path: Path) -> Path:
    """Distribution of the GC content of single sequences, and frequencies of 3-mers against those of real windows."""
    with plt.rc_context(_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8))
        real_K = _frequencies(reference)
        _draw_gc(left, reference, fill=True, color="#cccccc", label="real")
        right.plot([0, real_K.max()], [0, real_K.max()], color="#999999", lw=1)
        for index, (arm, found) in enumerate(arms.items()):
            colour, marker = COLOURS[index % 7], MARKERS[index % 7]
            _draw_gc(left, found, color=colour, lw=1.6, label=arm)
            right.plot(real_K, _frequencies(found), marker, color=colour, ms=4.5, alpha=0.75, label=arm)
        left.set(title="GC content", xlabel="fraction of a sequence's letters", ylabel="density")
        right.set(title="3-mers (line: as in real windows)", xlabel="frequency, real", ylabel="frequency, samples")
        for ax in (left, right):
            ax.legend(fontsize=9)
        figure.tight_layout()
        return _save(figure, path)


def _draw_gc(ax: Axes, spectrum: Spectrum, **style: Any) -> None:
    known_N = spectrum.gc_N[~np.isnan(spectrum.gc_N)]
    counts, edges = np.histogram(known_N, bins=40, range=(0, 1))
    ax.stairs(counts / max(1, len(known_N)) / np.diff(edges), edges, **style)


def _frequencies(spectrum: Spectrum) -> np.ndarray:
    counts_K = spectrum.kmers[3]
    return counts_K / max(1, counts_K.sum())
