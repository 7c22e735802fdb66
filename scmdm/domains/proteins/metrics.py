"""Metrics of generated proteins: validity, n-gram and composition fidelity, lengths, novelty.

The distance between two finite sets of real sequences is not zero, and grows as the sets shrink. Each distance is
therefore given with its floor: the distance of training sequences, equal in number to the valid samples.

Legend: N sequences, K = 20^n n-grams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wasserstein_distance

from scmdm.domains.interface import Measured
from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.letter_ngrams import count_ngrams, ngrams_of_each
from scmdm.domains.sample_values import SampleValues, distinct_parts, first_occurrences
from scmdm.domains.wasserstein import wasserstein_of_counts

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
NGRAM_LENGTHS = (1, 2, 3)  # 1: amino-acid composition


@dataclass(frozen=True)
class ProteinStatistics:
    """Statistics of a set of sequences."""

    ngrams: Mapping[int, np.ndarray]  # counts (K,) by n
    lengths_N: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[str]) -> ProteinStatistics:
        """Compute the statistics."""
        counts = {n: count_ngrams(sequences, n, AMINO_ACIDS) for n in NGRAM_LENGTHS}
        return cls(counts, np.array([len(sequence) for sequence in sequences], np.int64))

    def distances(self, other: ProteinStatistics) -> dict[str, float | None]:
        """Distances `js_distance_N` of n-grams and `length_distance` to another set; None if either set is empty."""
        found: dict[str, float | None] = {}
        for n in NGRAM_LENGTHS:
            divergence = JensenShannon.between(self.ngrams[n], other.ngrams[n])
            found[f"js_distance_{n}"] = None if divergence is None else divergence.distance
        empty = not len(self.lengths_N) or not len(other.lengths_N)
        found["length_distance"] = None if empty else float(wasserstein_distance(self.lengths_N, other.lengths_N))
        return found


@dataclass(frozen=True)
class ProteinReference:
    """Training and held-out sequences. Make it once for many evaluations."""

    train: Sequence[str]
    held_out: ProteinStatistics

    @classmethod
    def make(cls, train: Sequence[str], held_out: Sequence[str]) -> ProteinReference:
        return cls(train, ProteinStatistics.of(held_out))


def is_protein(text: str) -> bool:
    """True for a non-empty sequence of the 20 standard amino acids; X (unknown) is not one of them."""
    return bool(text) and set(text) <= set(AMINO_ACIDS)


def measure_proteins(sequences: Sequence[str], framed: Sequence[bool], reference: ProteinReference) -> Measured:
    """Compute all metrics of generated sequences, and the values for intervals.

    A sample is valid if it is `framed`, not empty, and made of the 20 standard amino acids. A fraction with denominator
    0 is 0.
    """
    framed_N, train = np.array(framed, bool), set(reference.train)
    valid_N = np.array([ok and is_protein(text) for text, ok in zip(sequences, framed, strict=True)], bool)
    texts = [text if ok else "" for text, ok in zip(sequences, valid_N, strict=True)]
    first_N = first_occurrences(texts) & valid_N
    unknown_N = np.array([text not in train for text in texts], bool)
    novel_N = first_N & unknown_N
    unique_N = distinct_parts([[text] if text else [] for text in texts])
    new_N = distinct_parts([[text] if text and unknown else [] for text, unknown in zip(texts, unknown_N, strict=True)])
    valid = [text for text in texts if text]
    chosen = np.linspace(0, len(reference.train) - 1, min(len(valid), len(reference.train)), dtype=np.int64)
    floors = ProteinStatistics.of([reference.train[index] for index in chosen]).distances(reference.held_out)
    values = {
        "validity": SampleValues.mean(valid_N),
        "framed": SampleValues.mean(framed_N),
        "uniqueness_of_samples": SampleValues.ratio(unique_N, np.ones(len(texts))),
        "novelty_of_unique": SampleValues.ratio(new_N, unique_N),
    }
    metrics = {
        "num_samples": len(sequences),
        "num_framed": int(framed_N.sum()),  # samples with [BOS], [EOS] and padding placed as in the data
        "num_valid": len(valid),
        "num_unique": int(first_N.sum()),  # distinct valid sequences
        "num_novel": int(novel_N.sum()),  # those that are not in the training set
        "mean_length": float(np.mean([len(text) for text in valid])) if valid else None,  # in residues
        **{name: values[name].value() or 0.0 for name in ("validity", "framed")},
        "uniqueness_of_samples": float(first_N.mean()) if len(texts) else 0.0,
        "novelty_of_unique": float(novel_N.sum() / max(1, first_N.sum())),
        **ProteinStatistics.of(valid).distances(reference.held_out),
        **{f"{name}_floor": value for name, value in floors.items()},
    }
    return Measured(metrics, values | _distance_values(texts, valid_N, reference.held_out))


def _distance_values(texts: Sequence[str], valid_N: np.ndarray, held_out: ProteinStatistics) -> dict[str, SampleValues]:
    found = {}
    for n in NGRAM_LENGTHS:
        metric = JensenShannon.of_counts(ngrams_of_each(texts, n, AMINO_ACIDS), held_out.ngrams[n], "distance")
        found[f"js_distance_{n}"] = SampleValues.jackknife(metric, len(texts))
    if valid_N.any():
        lengths = np.array([len(text) for text, ok in zip(texts, valid_N, strict=True) if ok])
        distance = wasserstein_of_counts(lengths, held_out.lengths_N)
        found["length_distance"] = SampleValues.jackknife(lambda counts_N: distance(counts_N[valid_N]), len(texts))
    return found
