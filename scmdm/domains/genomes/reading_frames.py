"""Open reading frames: stretches of codons without a stop codon, on both strands.

Most of a bacterium's genome codes for proteins, so that in most windows one of the six frames is open throughout. A
model of letters in a short context does not keep the frame; of windows of independent letters, one in ten has an open
frame at 254 letters. The property is one of a whole window, as validity is one of a whole molecule.

Legend: N sequences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# Those of the standard code and of most bacteria; the second three are their reverse complements.
_STOPS = (re.compile("(?=TAA|TAG|TGA)"), re.compile("(?=TTA|CTA|TCA)"))


def open_stretches(sequences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Longest open stretch of each sequence in codons, float64 (N,), and whether a whole frame is open, bool (N,).

    Frames start at the first three letters of each strand; the stop codon is not counted. Sequences of fewer than
    three letters have no codon: 0 and False.
    """
    found = [_of_one(sequence) for sequence in sequences]
    longest_N = np.array([longest for longest, _ in found], np.float64)
    return longest_N, np.array([is_open for _, is_open in found], bool)


def _of_one(sequence: str) -> tuple[int, bool]:
    longest, is_open = 0, False
    for stops in _STOPS:
        starts = np.array([match.start() for match in stops.finditer(sequence)], np.int64)
        for frame in range(3):
            codons = (len(sequence) - frame) // 3
            own = (starts[starts % 3 == frame] - frame) // 3
            longest = max(longest, int(np.diff(np.concatenate([[-1], own, [codons]])).max()) - 1)
            is_open |= codons > 0 and not len(own)
    return longest, is_open
