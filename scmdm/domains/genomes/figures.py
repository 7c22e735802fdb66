"""Figure of DNA sequences: GC content and 3-mer frequencies.

Legend: N sequences, K = 64 3-mers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from scmdm.domains.genomes.metrics import Spectrum
from scmdm.domains.plotting import COLOURS, MARKERS, REFERENCE_COLOUR, STYLE, save_figure


def genome_figure(reference: Spectrum, sets: Mapping[str, Spectrum], path: Path) -> Path:
    """Draw the distribution of GC content over sequences, and 3-mer frequencies against those of the reference."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8))
        real_K = _frequencies(reference)
        _draw_gc(left, reference, fill=True, color=REFERENCE_COLOUR, label="real")
        right.plot([0, real_K.max()], [0, real_K.max()], color="#999999", lw=1)
        for index, (label, found) in enumerate(sets.items()):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            _draw_gc(left, found, color=colour, lw=1.6, label=label)
            right.plot(real_K, _frequencies(found), marker, color=colour, ms=4.5, alpha=0.75, label=label)
        left.set(title="GC content", xlabel="fraction of a sequence's letters", ylabel="density")
        right.set(title="3-mers (line: equal to real data)", xlabel="frequency, real", ylabel="frequency, samples")
        for ax in (left, right):
            ax.legend(fontsize=9)
        figure.tight_layout()
        return save_figure(figure, path)


def _draw_gc(ax: Axes, spectrum: Spectrum, **style: Any) -> None:
    known_N = spectrum.gc_N[~np.isnan(spectrum.gc_N)]
    counts, edges = np.histogram(known_N, bins=40, range=(0, 1))
    ax.stairs(counts / max(1, len(known_N)) / np.diff(edges), edges, **style)


def _frequencies(spectrum: Spectrum) -> np.ndarray:
    counts_K = spectrum.kmers[3]
    return counts_K / max(1, counts_K.sum())
