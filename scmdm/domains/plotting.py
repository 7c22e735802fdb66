"""Style and helpers shared by all figures. A set of samples has the same colour and marker in every figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance

from scmdm.system.files import atomic_write_bytes

# Palette of Okabe and Ito, whose colours remain distinct under common colour blindness.
COLOURS = ("#555555", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE_COLOUR = "#cccccc"  # of held-out data
STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 12,
    "legend.frameon": False,
    "text.parse_math": False,  # names and labels of users may have dollars
}


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG and close it; returns `path`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    atomic_write_bytes(path, buffer.getvalue())
    return path


def distribution_figure(
    sets: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, units: Mapping[str, str] | None = None
) -> Path:
    """Draw histograms of properties: one panel per property, the first set filled, the others as lines.

    `sets` maps the name of a set to its values (N,) by property; all sets have the same properties. The legend gives
    the 1-Wasserstein distance to the first set, in the property's unit. The axes show the middle 99.8 % of the values
    of all sets.
    """
    (reference, values), *others = sets.items()
    with plt.rc_context(STYLE):
        columns = min(2, len(values))
        rows = -(-len(values) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3.9 * rows), squeeze=False)
        for ax, (name, values_N) in zip(axes.flat, values.items(), strict=False):
            edges = _bin_edges([found[name] for found in sets.values()])
            ax.hist(values_N, edges, density=True, color=REFERENCE_COLOUR, label=reference)
            for index, (label, found) in enumerate(others):
                distance = wasserstein_distance(found[name], values_N)
                ax.hist(
                    found[name],
                    edges,
                    density=True,
                    histtype="step",
                    lw=1.6,
                    color=COLOURS[index % len(COLOURS)],
                    label=f"{label}, distance {distance:.3g}",
                )
            ax.set(title=name, ylabel="density", xlabel=(units or {}).get(name, ""))
            ax.set_ylim(0, (1.1 + 0.11 * len(sets)) * ax.get_ylim()[1])  # room for the legend
            ax.legend(fontsize=9)
        for ax in list(axes.flat)[len(values) :]:
            ax.axis("off")
        figure.tight_layout()
        return save_figure(figure, path)


def _bin_edges(values: Sequence[np.ndarray]) -> np.ndarray:
    bins = int(np.clip(2 * min(map(len, values)) ** (1 / 3), 5, 60))  # Rice's rule
    low, high = np.quantile(np.concatenate(values), [0.001, 0.999])
    return np.linspace(low, high if high > low else low + 1.0, bins + 1)
