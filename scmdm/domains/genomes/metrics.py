"""Quality of generated DNA: k-mer spectra, GC content and open reading frames against real windows.

The Species10 protocol of kuleshov-group/discrete-diffusion-guidance compares spectra of 3-mers and 6-mers for each
species and averages them with the species' shares of the held-out windows. It calls the result of scipy's
`jensenshannon` with natural logarithms a divergence; that function returns the distance, the square root of the
divergence. Both are computed here.

The distance between two finite sets of real windows is not zero: in 6-mers, 64 real windows of 254 letters are as far
from 2,939 other windows as 1,024 windows of uniform random letters (0.20). Compare every value with that of an equal
number of real windows of the training split.

Legend: N sequences, K = 4^k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import wasserstein_distance

from scmdm.domains.genomes.reading_frames import open_stretches
from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.letter_ngrams import count_ngrams, ngrams_of_each
from scmdm.domains.sample_values import SampleValues
from scmdm.domains.wasserstein import wasserstein_of_counts

KMER_LENGTHS = (3, 6)
LETTERS = "ACGT"


@dataclass(frozen=True)
class Spectrum:
    """Statistics of a set of sequences."""

    kmers: Mapping[int, np.ndarray]  # counts (K,) by k
    gc_N: np.ndarray  # GC content of each sequence
    stretch_N: np.ndarray  # longest open reading stretch of each sequence, in codons
    open_N: np.ndarray  # whether one of the six reading frames of each sequence is open throughout
    mean_length: float  # in letters; 0 without sequences
    unknown: float  # fraction of letters other than A, C, G, T

    @classmethod
    def of(cls, sequences: Sequence[str]) -> Spectrum:
        """Compute the spectrum of sequences of any length. K-mers are in alphabetical order."""
        letters = sum(map(len, sequences))
        known = sum(sequence.count(letter) for sequence in sequences for letter in LETTERS)
        kmers = {k: count_ngrams(sequences, k, LETTERS) for k in KMER_LENGTHS}
        unknown = 1 - known / letters if letters else 0.0
        mean_length = letters / max(1, len(sequences))
        return cls(kmers, gc_contents(sequences), *open_stretches(sequences), mean_length, unknown)


@dataclass(frozen=True)
class GenomeReference:
    """Spectra of real windows. Make it once for many evaluations."""

    overall: Spectrum
    by_species: dict[str, Spectrum] = field(default_factory=dict)

    @classmethod
    def make(cls, sequences: Sequence[str], species: Sequence[str] | None = None) -> GenomeReference:
        """Compute the spectra. `species` is the species of each sequence, if known."""
        groups = {name: Spectrum.of(found) for name, found in _by_species(sequences, species).items()}
        return cls(Spectrum.of(sequences), groups)


def evaluate_genomes(
    sequences: Sequence[str],
    framed: Sequence[bool],
    reference: GenomeReference,
    species: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compute all metrics of generated sequences: the overall ones, and those of each species below `species`.

    `species` is the species that each sample was conditioned on, if any. The weighted distances, of which
    `weighted_js_distance` is the published metric, average over the reference's species with their shares of its
    windows; they require samples of every species.
    """
    found = _by_species(sequences, species)
    by_species = {
        name: compare_spectra(Spectrum.of(found[name]), spectrum)
        for name, spectrum in reference.by_species.items()
        if name in found
    }
    return {
        **compare_spectra(Spectrum.of(sequences), reference.overall),
        "num_framed": sum(framed),  # samples with [BOS] and [EOS] placed as in the data
        "num_distinct": len(set(sequences)),
        **_weighted(by_species, reference.by_species, "distance"),
        **_weighted(by_species, reference.by_species, "divergence"),
        "species": by_species,
    }


def genome_values(sequences: Sequence[str], reference: GenomeReference) -> dict[str, SampleValues]:
    """Values for intervals of the overall metrics. Those by species have none."""
    found = {}
    for k in KMER_LENGTHS:
        rows_NK, real_K = ngrams_of_each(sequences, k, LETTERS), reference.overall.kmers[k]
        for kind in ("divergence", "distance"):
            metric = JensenShannon.of_counts(rows_NK, real_K, kind)
            found[f"js_{kind}_{k}"] = SampleValues.jackknife(metric, len(sequences))
    gc_N, reference_N = gc_contents(sequences), reference.overall.gc_N
    found["gc_mean"] = SampleValues.mean(gc_N)
    known_N, real_N = ~np.isnan(gc_N), reference_N[~np.isnan(reference_N)]
    if known_N.any() and len(real_N):
        distance = wasserstein_of_counts(gc_N[known_N], real_N)
        found["gc_distance"] = SampleValues.jackknife(lambda counts_N: distance(counts_N[known_N]), len(sequences))
    stretch_N, open_N = open_stretches(sequences)
    found["open_frame"] = SampleValues.mean(open_N)
    if len(sequences) and len(reference.overall.stretch_N):
        by_counts = wasserstein_of_counts(stretch_N, reference.overall.stretch_N)
        found["open_distance"] = SampleValues.jackknife(by_counts, len(sequences))
    return found


def _by_species(sequences: Sequence[str], species: Sequence[str] | None) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    if species is not None:
        for name, sequence in zip(species, sequences, strict=True):
            groups.setdefault(name, []).append(sequence)
    return dict(sorted(groups.items()))


def _weighted(metrics: Mapping[str, Mapping[str, Any]], spectra: Mapping[str, Spectrum], kind: str) -> dict[str, float]:
    weights = [len(spectrum.gc_N) for spectrum in spectra.values()]
    weighted = {}
    for k in KMER_LENGTHS:
        values = [value for name in metrics if (value := metrics[name][f"js_{kind}_{k}"]) is not None]
        if values and len(values) == len(weights):
            weighted[f"weighted_js_{kind}_{k}"] = float(np.average(values, weights=weights))
    return weighted


def compare_spectra(samples: Spectrum, reference: Spectrum) -> dict[str, Any]:
    """Compare two sets of sequences; None where either has no data."""
    gc_N, reference_N = (s.gc_N[~np.isnan(s.gc_N)] for s in (samples, reference))
    kmers = {k: JensenShannon.between(samples.kmers[k], reference.kmers[k]) for k in KMER_LENGTHS}
    return {
        "num_samples": len(samples.gc_N),
        "gc_mean": _mean(gc_N),
        "gc_reference": _mean(reference_N),
        "gc_distance": _distance(gc_N, reference_N),
        "open_frame": _mean(samples.open_N),
        "open_frame_reference": _mean(reference.open_N),
        "open_distance": _distance(samples.stretch_N, reference.stretch_N),
        "mean_length": samples.mean_length,  # an early [EOS] shortens a sample
        "unknown": samples.unknown,
        **{
            f"js_{kind}_{k}": None if found is None else getattr(found, kind)
            for k, found in kmers.items()
            for kind in ("divergence", "distance")
        },
    }


def _mean(values_N: np.ndarray) -> float | None:
    return float(values_N.mean()) if len(values_N) else None


def _distance(values_N: np.ndarray, reference_N: np.ndarray) -> float | None:
    return float(wasserstein_distance(values_N, reference_N)) if len(values_N) and len(reference_N) else None


def gc_contents(sequences: Sequence[str]) -> np.ndarray:
    """Fraction of G and C among the known letters of each sequence, float64 (N,); nan without a known letter."""
    gc_N = np.full(len(sequences), np.nan)
    for row, sequence in enumerate(sequences):
        counts = {letter: sequence.count(letter) for letter in LETTERS}
        if known := sum(counts.values()):
            gc_N[row] = (counts["G"] + counts["C"]) / known
    return gc_N
