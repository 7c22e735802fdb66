"""Metrics of codes of a discrete autoencoder: frequencies of codes and of neighbouring pairs against held-out data.

The decoder of the autoencoder is not needed. Two finite sets of real samples differ as well, so each distance is given
with its floor: the distance of an equal number of training samples.

Legend: N samples, H rows, W codes per row, K codes in the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from scmdm.domains.interface import Measured
from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.sample_values import SampleValues

Counts = tuple[np.ndarray, np.ndarray]  # outcomes in ascending order, and the count of each


@dataclass(frozen=True)
class CodeReference:
    """Training samples and counts of held-out samples. Make it once for many evaluations."""

    train_NHW: np.ndarray
    usage: Counts  # of held-out samples
    pairs: Counts
    codebook: int

    @classmethod
    def make(cls, train_NHW: np.ndarray, held_out_NHW: np.ndarray, codebook: int) -> CodeReference:
        return cls(train_NHW, code_counts(held_out_NHW), pair_counts(held_out_NHW, codebook), codebook)

    def distances(self, codes_NHW: np.ndarray) -> tuple[float | None, float | None]:
        """Jensen-Shannon distances of code and pair frequencies to the held-out samples."""
        pairs = pair_counts(codes_NHW, self.codebook)
        return count_distance(code_counts(codes_NHW), self.usage), count_distance(pairs, self.pairs)


def code_counts(codes_NHW: np.ndarray) -> Counts:
    """Count each code."""
    return np.unique(codes_NHW, return_counts=True)


def pair_counts(codes_NHW: np.ndarray, codebook: int) -> Counts:
    """Count pairs of neighbours; the outcome is `2 (left K + right)`, or `2 (upper K + lower) + 1`."""
    codes_NHW = codes_NHW.astype(np.int64)
    horizontal = (codes_NHW[:, :, :-1] * codebook + codes_NHW[:, :, 1:]).ravel() * 2
    vertical = (codes_NHW[:, :-1] * codebook + codes_NHW[:, 1:]).ravel() * 2 + 1
    return np.unique(np.concatenate([horizontal, vertical]), return_counts=True)


def count_distance(a: Counts, b: Counts) -> float | None:
    """Jensen-Shannon distance of two sets of counts, with natural logarithms; None if one is empty."""
    outcomes_K = np.union1d(a[0], b[0])
    p_K, q_K = _histograms((a, b), outcomes_K).toarray()
    found = JensenShannon.between(p_K, q_K)
    return None if found is None else found.distance


def measure_codes(codes_NHW: np.ndarray, framed: Sequence[bool], reference: CodeReference) -> Measured:
    """Compute all metrics of codes (N, H, W), and the values for intervals; the use of the codebook has none.

    Samples that are not `framed` are excluded.
    """
    whole_N, train_NHW = np.array(framed, bool), reference.train_NHW
    whole_NHW, known = codes_NHW[whole_N], {row.tobytes() for row in train_NHW.astype(np.int64)}
    copies_N = whole_N & np.array([row.tobytes() in known for row in codes_NHW.astype(np.int64)], bool)
    chosen = np.linspace(0, len(train_NHW) - 1, min(len(whole_NHW), len(train_NHW)), dtype=np.int64)
    real_NHW = train_NHW[chosen]
    (own_usage, own_pairs), (floor_usage, floor_pairs) = (reference.distances(x) for x in (whole_NHW, real_NHW))
    values = {"framed": SampleValues.mean(whole_N), "copies": SampleValues.mean(copies_N)}
    metrics = {
        "num_samples": len(codes_NHW),
        "num_framed": int(whole_N.sum()),  # samples of [BOS] and codes only
        "usage_distance": own_usage,
        "usage_distance_floor": floor_usage,
        "pair_distance": own_pairs,
        "pair_distance_floor": floor_pairs,
        "codebook_used": len(np.unique(whole_NHW)) / reference.codebook,
        "codebook_used_floor": len(np.unique(real_NHW)) / reference.codebook,
        "num_copies": int(copies_N.sum()),  # samples equal to a training sample
        **{name: found.value() for name, found in values.items()},
    }
    return Measured(metrics, values | _distance_values(codes_NHW, whole_N, reference))


def _distance_values(codes_NHW: np.ndarray, whole_N: np.ndarray, reference: CodeReference) -> dict[str, SampleValues]:
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    samples = list(zip(codes_NHW, whole_N, strict=True))
    counted = {
        "usage_distance": ([code_counts(codes) if ok else empty for codes, ok in samples], reference.usage),
        "pair_distance": (
            [pair_counts(codes[None], reference.codebook) if ok else empty for codes, ok in samples],
            reference.pairs,
        ),
    }
    found = {}
    for name, (rows, real) in counted.items():
        outcomes_K = np.unique(np.concatenate([real[0], *(own for own, _ in rows)]))
        rows_NK = _histograms(rows, outcomes_K)
        metric = JensenShannon.of_counts(rows_NK, _histograms([real], outcomes_K).toarray()[0], "distance")
        found[name] = SampleValues.jackknife(metric, len(codes_NHW))
    return found


def _histograms(rows: Sequence[Counts], outcomes_K: np.ndarray) -> sparse.csr_array:
    """Counts (N, K) of the outcomes."""
    columns = np.searchsorted(outcomes_K, np.concatenate([own for own, _ in rows]))
    ends = np.cumsum([0, *(len(own) for own, _ in rows)])
    counts = np.concatenate([own for _, own in rows])
    return sparse.csr_array((counts, columns, ends), (len(rows), len(outcomes_K)))
