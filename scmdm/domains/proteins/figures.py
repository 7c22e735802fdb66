"""Figure of proteins: lengths and amino-acid composition.

Legend: N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from scmdm.domains.letter_ngrams import count_ngrams
from scmdm.domains.plotting import COLOURS, MARKERS, REFERENCE_COLOUR, STYLE, save_figure
from scmdm.domains.proteins.metrics import AMINO_ACIDS


def protein_figure(sets: Mapping[str, Sequence[str]], path: Path) -> Path:
    """Draw the distribution of lengths and the amino-acid composition of sets of sequences (at least one in each).

    The first set is the reference.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
        longest = max(len(sequence) for sequences in sets.values() for sequence in sequences)
        edges = np.linspace(0.5, longest + 0.5, min(longest, 40) + 1)
        places = np.arange(len(AMINO_ACIDS))
        for index, (label, sequences) in enumerate(sets.items()):
            lengths_N = [len(sequence) for sequence in sequences]
            frequencies = count_ngrams(sequences, 1, AMINO_ACIDS) / max(1, sum(lengths_N))
            if index == 0:
                left.hist(lengths_N, edges, density=True, color=REFERENCE_COLOUR, label=label)
                right.bar(places, frequencies, color=REFERENCE_COLOUR, label=label)
                continue
            colour = COLOURS[(index - 1) % len(COLOURS)]
            marker = MARKERS[(index - 1) % len(MARKERS)]
            left.hist(lengths_N, edges, density=True, histtype="step", lw=1.6, color=colour, label=label)
            right.plot(places, frequencies, marker, color=colour, ms=4.5, alpha=0.75, label=label)
        left.set(title="length", xlabel="residues", ylabel="density")
        right.set(title="amino-acid composition", ylabel="frequency")
        right.set_xticks(places, list(AMINO_ACIDS))
        for ax in (left, right):
            ax.legend(fontsize=9)
        figure.tight_layout()
        return save_figure(figure, path)
