"""Counts of the n-grams of sequences of letters.

Legend: N sequences, L letters, K = A^n n-grams of an alphabet of A letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

_LETTERS_AT_ONCE = 1 << 20


def count_ngrams(sequences: Sequence[str], n: int, alphabet: str) -> np.ndarray:
    """Count each n-gram of the alphabet, overlaps included; returns int64 (K,) in the alphabet's order.

    N-grams that contain another letter are not counted.
    """
    unknown = len(alphabet)
    digit_of = np.full(256, unknown, np.int64)
    digit_of[np.frombuffer(alphabet.encode(), np.uint8)] = range(unknown)
    counts_K = np.zeros(len(alphabet) ** n, np.int64)
    for text in _joined(sequences):
        digits_L = digit_of[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)]
        places = max(0, len(digits_L) - n + 1)
        codes, known = np.zeros(places, np.int64), np.ones(places, bool)
        for offset in range(n):
            digits = digits_L[offset : offset + places]
            codes, known = codes * len(alphabet) + digits, known & (digits < unknown)
        counts_K += np.bincount(codes[known], minlength=len(counts_K))
    return counts_K


def ngrams_of_each(sequences: Sequence[str], n: int, alphabet: str) -> sparse.csr_array:
    """Count the n-grams of each sequence (at least one); returns (N, K)."""
    return sparse.vstack([sparse.csr_array(count_ngrams([text], n, alphabet)[None]) for text in sequences])


def _joined(sequences: Sequence[str]) -> Iterator[str]:
    """Join sequences into long strings, separated by a character that is no letter, to count many at once."""
    gathered: list[str] = []
    letters = 0
    for sequence in sequences:
        gathered.append(sequence)
        letters += len(sequence) + 1
        if letters >= _LETTERS_AT_ONCE:
            yield "-".join(gathered)
            gathered, letters = [], 0
    yield "-".join(gathered)
