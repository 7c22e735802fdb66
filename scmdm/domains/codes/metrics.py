"""Metrics of codes of a discrete autoencoder: frequencies of codes and of neighbouring pairs against held-out data.

The decoder of the autoencoder is not needed. Two finite sets of real samples differ as well, so each distance is given
with its floor: the distance of an equal number of training samples.

Legend: N samples, H rows, W codes per row, K codes in the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse

from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.sample_values import SampleValues

Counts = tuple[np.ndarray, np.ndarray]  # outcomes in ascending order, and the count of each


@dataclass(frozen=True)
class CodeMetrics:
    """Metrics of the framed samples; None if there are none."""

    num_samples: int
    num_framed: int  # samples of [BOS] and codes only
    usage_distance: float | None  # Jensen-Shannon distance of code frequencies
    usage_distance_floor: float | None
    pair_distance: float | None  # Jensen-Shannon distance of horizontal and vertical neighbour pairs
    pair_distance_floor: float | None
    codebook_used: float  # fraction of the codebook that the samples use
    codebook_used_floor: float  # fraction that an equal number of training samples uses
    num_copies: int  # samples equal to a training sample

    def as_dict(self) -> dict[str, Any]:
        """All fields, and the fractions of framed samples and copies."""
        count = max(1, self.num_samples)
        return {**asdict(self), "framed": self.num_framed / count, "copies": self.num_copies / count}


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


def evaluate_codes(codes_NHW: np.ndarray, framed: Sequence[bool], reference: CodeReference) -> CodeMetrics:
    """Compute all metrics of codes (N, H, W). Samples that are not `framed` are excluded."""
    train_NHW, whole_NHW = reference.train_NHW, codes_NHW[np.asarray(framed, bool)]
    chosen = np.linspace(0, len(train_NHW) - 1, min(len(whole_NHW), len(train_NHW)), dtype=np.int64)
    real_NHW = train_NHW[chosen]
    known = {row.tobytes() for row in train_NHW.astype(np.int64)}
    (own_usage, own_pairs), (floor_usage, floor_pairs) = (reference.distances(x) for x in (whole_NHW, real_NHW))
    return CodeMetrics(
        num_samples=len(codes_NHW),
        num_framed=len(whole_NHW),
        usage_distance=own_usage,
        usage_distance_floor=floor_usage,
        pair_distance=own_pairs,
        pair_distance_floor=floor_pairs,
        codebook_used=len(np.unique(whole_NHW)) / reference.codebook,
        codebook_used_floor=len(np.unique(real_NHW)) / reference.codebook,
        num_copies=sum(row.tobytes() in known for row in whole_NHW.astype(np.int64)),
    )


def code_values(codes_NHW: np.ndarray, framed: Sequence[bool], reference: CodeReference) -> dict[str, SampleValues]:
    """Values for intervals of the distances and fractions. The use of the codebook has none."""
    whole_N = np.asarray(framed, bool)
    known = {row.tobytes() for row in reference.train_NHW.astype(np.int64)}
    copies_N = whole_N & np.array([row.tobytes() in known for row in codes_NHW.astype(np.int64)], bool)
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    samples = list(zip(codes_NHW, whole_N, strict=True))
    counted = {
        "usage_distance": ([code_counts(codes) if ok else empty for codes, ok in samples], reference.usage),
        "pair_distance": (
            [pair_counts(codes[None], reference.codebook) if ok else empty for codes, ok in samples],
            reference.pairs,
        ),
    }
    found = {"framed": SampleValues.mean(whole_N), "copies": SampleValues.mean(copies_N)}
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
