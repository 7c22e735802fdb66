"""Quality of generated DNA: k-mer spectra and GC content against real windows, overall and by species.

The Species10 protocol of kuleshov-group/discrete-diffusion-guidance compares spectra of 3-mers and 6-mers for each
species and averages them with the species' shares of the held-out windows. It calls the result of scipy's
`jensenshannon` with natural logarithms a divergence; that function returns the distance, the square root of the
divergence. Both are computed here.

The distance between two finite sets of real windows is not zero: in 6-mers, 64 real windows of 254 letters are as far
from 2,939 other windows as 1,024 windows of uniform random letters (0.20). Compare every value with that of an equal
number of real windows of the training split.

Legend: N sequences, L letters of a sequence, K = 4^k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import wasserstein_distance

from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.sample_values import SampleValues
from scmdm.domains.wasserstein import wasserstein_of_counts

KMER_LENGTHS = (3, 6)
LETTERS = "ACGT"
_UNKNOWN = len(LETTERS)
_LETTERS_AT_ONCE = 1 << 20
_DIGITS = np.full(256, _UNKNOWN, np.int8)
_DIGITS[np.frombuffer(LETTERS.encode(), np.uint8)] = range(len(LETTERS))


@dataclass(frozen=True)
class Spectrum:
    """Statistics of a set of sequences."""

    kmers: Mapping[int, np.ndarray]  # counts (K,) by k
    gc_N: np.ndarray  # GC content of each sequence
    mean_length: float  # in letters; 0 without sequences
    unknown: float  # fraction of letters other than A, C, G, T

    @classmethod
    def of(cls, sequences: Sequence[str]) -> Spectrum:
        """Compute the spectrum of sequences of any length. K-mers are in alphabetical order."""
        letters = sum(map(len, sequences))
        known = sum(sequence.count(letter) for sequence in sequences for letter in LETTERS)
        kmers = {k: kmer_counts(sequences, k) for k in KMER_LENGTHS}
        unknown = 1 - known / letters if letters else 0.0
        return cls(kmers, gc_contents(sequences), letters / max(1, len(sequences)), unknown)


@dataclass(frozen=True)
class SpectrumMetrics:
    """Comparison of samples with a reference; None where either has no data."""

    num_samples: int
    kmers: dict[int, JensenShannon | None]
    gc_mean: float | None  # of the samples
    gc_reference: float | None
    gc_distance: float | None  # 1-Wasserstein distance of the distributions of GC content
    mean_length: float  # of the samples, in letters; an early [EOS] shortens a sample
    unknown: float  # fraction of the samples' letters other than A, C, G, T

    def as_dict(self) -> dict[str, Any]:
        """Flat names: `js_divergence_3`, `js_distance_3` and so on."""
        flat = asdict(self)
        for k, found in flat.pop("kmers").items():
            for kind in ("divergence", "distance"):
                flat[f"js_{kind}_{k}"] = None if found is None else found[kind]
        return flat


@dataclass(frozen=True)
class GenomeMetrics:
    """Metrics over all samples and by species; the published metric is `weighted_js_distance`."""

    overall: SpectrumMetrics
    num_framed: int  # samples with [BOS] and [EOS] placed as in the data
    num_distinct: int
    by_species: dict[str, SpectrumMetrics] = field(default_factory=dict)
    weighted_js_distance: dict[int, float] = field(default_factory=dict)
    weighted_js_divergence: dict[int, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All metrics: the overall ones at the top level, those of each species below `species`."""
        return {
            **self.overall.as_dict(),
            "num_framed": self.num_framed,
            "num_distinct": self.num_distinct,
            **{f"weighted_js_distance_{k}": value for k, value in self.weighted_js_distance.items()},
            **{f"weighted_js_divergence_{k}": value for k, value in self.weighted_js_divergence.items()},
            "species": {name: metrics.as_dict() for name, metrics in self.by_species.items()},
        }


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
) -> GenomeMetrics:
    """Compute all metrics of generated sequences.

    `species` is the species that each sample was conditioned on, if any. The weighted distances average over the
    reference's species with their shares of its windows; they require samples of every species.
    """
    found = _by_species(sequences, species)
    by_species = {
        name: compare_spectra(Spectrum.of(found[name]), spectrum)
        for name, spectrum in reference.by_species.items()
        if name in found
    }
    return GenomeMetrics(
        overall=compare_spectra(Spectrum.of(sequences), reference.overall),
        num_framed=sum(framed),
        num_distinct=len(set(sequences)),
        by_species=by_species,
        weighted_js_distance=_weighted(by_species, reference.by_species, "distance"),
        weighted_js_divergence=_weighted(by_species, reference.by_species, "divergence"),
    )


def genome_values(sequences: Sequence[str], reference: GenomeReference) -> dict[str, SampleValues]:
    """Values for intervals of the overall metrics. Those by species have none."""
    found = {}
    for k in KMER_LENGTHS:
        rows_NK = sparse.vstack([sparse.csr_array(kmer_counts([text], k)[None]) for text in sequences])
        real_K = reference.overall.kmers[k]
        for kind in ("divergence", "distance"):
            metric = JensenShannon.of_counts(rows_NK, real_K, kind)
            found[f"js_{kind}_{k}"] = SampleValues.jackknife(metric, len(sequences))
    gc_N, reference_N = gc_contents(sequences), reference.overall.gc_N
    found["gc_mean"] = SampleValues.mean(gc_N)
    known_N, real_N = ~np.isnan(gc_N), reference_N[~np.isnan(reference_N)]
    if known_N.any() and len(real_N):
        distance = wasserstein_of_counts(gc_N[known_N], real_N)
        found["gc_distance"] = SampleValues.jackknife(lambda counts_N: distance(counts_N[known_N]), len(sequences))
    return found


def _by_species(sequences: Sequence[str], species: Sequence[str] | None) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    if species is not None:
        for name, sequence in zip(species, sequences, strict=True):
            groups.setdefault(name, []).append(sequence)
    return dict(sorted(groups.items()))


def _weighted(metrics: Mapping[str, SpectrumMetrics], spectra: Mapping[str, Spectrum], kind: str) -> dict[int, float]:
    weights = [len(spectrum.gc_N) for spectrum in spectra.values()]
    weighted = {}
    for k in KMER_LENGTHS:
        found = [metrics[name].kmers[k] for name in spectra if name in metrics]
        values = [getattr(value, kind) for value in found if value is not None]
        if values and len(values) == len(weights):
            weighted[k] = float(np.average(values, weights=weights))
    return weighted


def compare_spectra(samples: Spectrum, reference: Spectrum) -> SpectrumMetrics:
    """Compare two sets of sequences."""
    gc_N, reference_N = (s.gc_N[~np.isnan(s.gc_N)] for s in (samples, reference))
    return SpectrumMetrics(
        num_samples=len(samples.gc_N),
        kmers={k: JensenShannon.between(samples.kmers[k], reference.kmers[k]) for k in KMER_LENGTHS},
        gc_mean=float(gc_N.mean()) if len(gc_N) else None,
        gc_reference=float(reference_N.mean()) if len(reference_N) else None,
        gc_distance=float(wasserstein_distance(gc_N, reference_N)) if len(gc_N) and len(reference_N) else None,
        mean_length=samples.mean_length,
        unknown=samples.unknown,
    )


def kmer_counts(sequences: Sequence[str], k: int) -> np.ndarray:
    """Count each of the 4^k k-mers, overlaps included; returns int64 (K,) in alphabetical order.

    K-mers that contain a letter other than A, C, G and T are not counted.
    """
    counts_K = np.zeros(len(LETTERS) ** k, np.int64)
    for text in _joined(sequences):
        digits_L = _digits(text)
        places = max(0, len(digits_L) - k + 1)
        codes, known = np.zeros(places, np.int64), np.ones(places, bool)
        for offset in range(k):
            digits = digits_L[offset : offset + places]
            codes, known = codes * len(LETTERS) + digits, known & (digits < _UNKNOWN)
        counts_K += np.bincount(codes[known], minlength=len(counts_K))
    return counts_K


def _joined(sequences: Sequence[str]) -> Iterator[str]:
    """Join sequences into long strings, separated by an unknown letter, to count many at once."""
    gathered: list[str] = []
    letters = 0
    for sequence in sequences:
        gathered.append(sequence)
        letters += len(sequence) + 1
        if letters >= _LETTERS_AT_ONCE:
            yield "N".join(gathered)
            gathered, letters = [], 0
    yield "N".join(gathered)


def gc_contents(sequences: Sequence[str]) -> np.ndarray:
    """Fraction of G and C among the known letters of each sequence, float64 (N,); nan without a known letter."""
    gc_N = np.full(len(sequences), np.nan)
    for row, sequence in enumerate(sequences):
        counts = {letter: sequence.count(letter) for letter in LETTERS}
        if known := sum(counts.values()):
            gc_N[row] = (counts["G"] + counts["C"]) / known
    return gc_N


def _digits(sequence: str) -> np.ndarray:
    """Encode A, C, G, T as 0 to 3 and any other letter as 4; returns int8 (L,)."""
    return _DIGITS[np.frombuffer(sequence.encode("latin-1", "replace"), np.uint8)]
