"""Metrics of generated proteins: validity, n-gram and composition fidelity, lengths, novelty.

The distance between two finite sets of real sequences is not zero, and grows as the sets shrink. Each distance is
therefore given with its floor: the distance of training sequences, equal in number to the valid samples.

Legend: N sequences, K = 20^n n-grams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import wasserstein_distance

from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.sample_values import SampleValues, first_occurrences
from scmdm.domains.wasserstein import wasserstein_of_counts

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
NGRAM_LENGTHS = (1, 2, 3)  # 1: amino-acid composition
_UNKNOWN = len(AMINO_ACIDS)
_CODES = np.full(256, _UNKNOWN, np.int64)
_CODES[np.frombuffer(AMINO_ACIDS.encode(), np.uint8)] = range(len(AMINO_ACIDS))


@dataclass(frozen=True)
class ProteinStatistics:
    """Statistics of a set of sequences."""

    ngrams: Mapping[int, np.ndarray]  # counts (K,) by n
    lengths_N: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[str]) -> ProteinStatistics:
        """Compute the statistics."""
        counts = {n: ngram_counts(sequences, n) for n in NGRAM_LENGTHS}
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


@dataclass(frozen=True)
class ProteinMetrics:
    """Counts over all samples, and distances of the valid ones."""

    num_samples: int
    num_framed: int  # samples with [BOS], [EOS] and padding placed as in the data
    num_valid: int  # framed, not empty, and made of the 20 standard amino acids
    num_unique: int  # distinct valid sequences
    num_novel: int  # distinct valid sequences that are not in the training set
    mean_length: float | None  # of the valid sequences, in residues
    distances: dict[str, float | None]  # to held-out sequences
    floors: dict[str, float | None]  # distances of an equal number of training sequences

    def as_dict(self) -> dict[str, Any]:
        """Return all fields with flat names, and fractions; a fraction with denominator 0 is 0."""
        flat = asdict(self)
        distances, floors = flat.pop("distances"), flat.pop("floors")
        count = max(1, self.num_samples)
        return {
            **flat,
            "validity": self.num_valid / count,
            "framed": self.num_framed / count,
            "uniqueness_of_samples": self.num_unique / count,
            "novelty_of_unique": self.num_novel / max(1, self.num_unique),
            **distances,
            **{f"{name}_floor": value for name, value in floors.items()},
        }


def is_protein(text: str) -> bool:
    """True for a non-empty sequence of the 20 standard amino acids; X (unknown) is not one of them."""
    return bool(text) and set(text) <= set(AMINO_ACIDS)


def ngram_counts(sequences: Sequence[str], n: int) -> np.ndarray:
    """Count each of the 20^n n-grams, overlaps included; returns int64 (K,) in alphabetical order.

    N-grams that contain another letter are not counted.
    """
    codes = _CODES[np.frombuffer("-".join(sequences).encode("latin-1", "replace"), np.uint8)]
    places = max(0, len(codes) - n + 1)
    index, known = np.zeros(places, np.int64), np.ones(places, bool)
    for offset in range(n):
        letters = codes[offset : offset + places]
        index, known = index * len(AMINO_ACIDS) + letters, known & (letters < _UNKNOWN)
    return np.bincount(index[known], minlength=len(AMINO_ACIDS) ** n)


def evaluate_proteins(sequences: Sequence[str], framed: Sequence[bool], reference: ProteinReference) -> ProteinMetrics:
    """Compute all metrics of generated sequences."""
    valid = [text for text, ok in zip(sequences, framed, strict=True) if ok and is_protein(text)]
    unique = set(valid)
    chosen = np.linspace(0, len(reference.train) - 1, min(len(valid), len(reference.train)), dtype=np.int64)
    real = [reference.train[index] for index in chosen]
    statistics = ProteinStatistics.of(valid)
    return ProteinMetrics(
        num_samples=len(sequences),
        num_framed=sum(framed),
        num_valid=len(valid),
        num_unique=len(unique),
        num_novel=len(unique - set(reference.train)),
        mean_length=float(statistics.lengths_N.mean()) if valid else None,
        distances=statistics.distances(reference.held_out),
        floors=ProteinStatistics.of(real).distances(reference.held_out),
    )


def protein_values(
    sequences: Sequence[str], framed: Sequence[bool], reference: ProteinReference
) -> dict[str, SampleValues]:
    """Values for intervals of the fractions and distances."""
    valid_N = np.array([ok and is_protein(text) for text, ok in zip(sequences, framed, strict=True)], bool)
    texts = [text if ok else "" for text, ok in zip(sequences, valid_N, strict=True)]
    first_N = first_occurrences(texts) & valid_N
    train = set(reference.train)
    novel_N = first_N & np.array([text not in train for text in texts], bool)
    found = {
        "validity": SampleValues.mean(valid_N),
        "framed": SampleValues.mean(np.array(framed, bool)),
        "uniqueness_of_samples": SampleValues.mean(first_N),
        "novelty_of_unique": SampleValues.ratio(novel_N, first_N),
    }
    for n in NGRAM_LENGTHS:
        rows_NK = sparse.vstack([sparse.csr_array(ngram_counts([text], n)[None]) for text in texts])
        metric = JensenShannon.of_counts(rows_NK, reference.held_out.ngrams[n], "distance")
        found[f"js_distance_{n}"] = SampleValues.jackknife(metric, len(texts))
    if valid_N.any():
        lengths = np.array([len(text) for text, ok in zip(texts, valid_N, strict=True) if ok])
        distance = wasserstein_of_counts(lengths, reference.held_out.lengths_N)
        found["length_distance"] = SampleValues.jackknife(lambda counts_N: distance(counts_N[valid_N]), len(texts))
    return found
