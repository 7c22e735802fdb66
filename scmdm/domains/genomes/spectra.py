"""Quality of generated DNA: k-mer spectra and GC content against real windows, overall and by species.

The protocol for Species10 in kuleshov-group/discrete-diffusion-guidance compares spectra of 3- and 6-mers by species,
and takes the mean weighted with the species' shares of the held-out windows. What it calls JS divergence is scipy's
`jensenshannon` with natural logarithms: the DISTANCE, which is the square root of the divergence. Both are given here.

Two finite sets of windows of the same genome differ, too, and the distance by much (it is a root): in 6-mers 64 real
windows of 254 letters are as far from 2,939 others as 1,024 windows of uniform letters (0.20). So read every value
beside that of as many real windows of the training split, which the same functions give.

Legend: N sequences, L letters of a sequence, K = 4^k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import wasserstein_distance

from scmdm.domains.jensen_shannon import JensenShannon

KMER_LENGTHS = (3, 6)
LETTERS = "ACGT"
_UNKNOWN = len(LETTERS)
_LETTERS_AT_ONCE = 1 << 20
_DIGITS = np.full(256, _UNKNOWN, np.int8)
_DIGITS[np.frombuffer(LETTERS.encode(), np.uint8)] = range(len(LETTERS))


@dataclass(frozen=True)
class Spectrum:
    """What is kept of a set of sequences: k-mer counts by k, and the GC content of each."""

    kmers: Mapping[int, np.ndarray]
    gc_N: np.ndarray
    mean_length: float  # letters; 0 without sequences
    unknown: float  # fraction of letters other than A, C, G, T

    @classmethod
    def of(cls, sequences: Sequence[str]) -> Spectrum:
        """The spectrum of sequences of any length; the order of k-mers is alphabetical."""
        letters = sum(map(len, sequences))
        known = sum(sequence.count(letter) for sequence in sequences for letter in LETTERS)
        kmers = {k: kmer_counts(sequences, k) for k in KMER_LENGTHS}
        unknown = 1 - known / letters if letters else 0.0
        return cls(kmers, gc_contents(sequences), letters / max(1, len(sequences)), unknown)


@dataclass(frozen=True)
class SpectrumMetrics:
    """Samples against a reference; None where one of the two has nothing to compare."""

    num_samples: int
    kmers: dict[int, JensenShannon | None]
    gc_mean: float | None  # of the samples
    gc_reference: float | None
    gc_distance: float | None  # 1-Wasserstein distance of the GC contents of single sequences, in fractions of letters
    mean_length: float  # of the samples, in letters: an end mark before the window's end makes them shorter
    unknown: float  # fraction of their letters

    def as_dict(self) -> dict[str, Any]:
        """Flat: `js_divergence_3`, `js_distance_3` and so on."""
        flat = asdict(self)
        for k, found in flat.pop("kmers").items():
            for kind in ("divergence", "distance"):
                flat[f"js_{kind}_{k}"] = None if found is None else found[kind]
        return flat


@dataclass(frozen=True)
class GenomeMetrics:
    """`weighted_js_distance` is the published figure: see `evaluate_genomes`."""

    overall: SpectrumMetrics
    num_framed: int  # begin and end are where the data has them
    num_distinct: int
    by_species: dict[str, SpectrumMetrics] = field(default_factory=dict)
    weighted_js_distance: dict[int, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything; the overall metrics flat, those of a species below `species`."""
        return {
            **self.overall.as_dict(),
            "num_framed": self.num_framed,
            "num_distinct": self.num_distinct,
            **{f"weighted_js_distance_{k}": value for k, value in self.weighted_js_distance.items()},
            "species": {name: metrics.as_dict() for name, metrics in self.by_species.items()},
        }


@dataclass(frozen=True)
class GenomeReference:
    """Real windows that samples are compared with; make it once for many evaluations."""

    overall: Spectrum
    by_species: dict[str, Spectrum] = field(default_factory=dict)

    @classmethod
    def make(cls, sequences: Sequence[str], species: Sequence[str] | None = None) -> GenomeReference:
        """`species` names that of each sequence, if it is known."""
        groups = {name: Spectrum.of(found) for name, found in _by_species(sequences, species).items()}
        return cls(Spectrum.of(sequences), groups)


def evaluate_genomes(
    sequences: Sequence[str],
    framed: Sequence[bool],
    reference: GenomeReference,
    species: Sequence[str] | None = None,
) -> GenomeMetrics:
    """All metrics of generated sequences; `species` names that which each was asked to be, if it was.

    The weighted distances are means over the reference's species with their shares of its windows, and are there when
    every one of those species has been sampled.
    """
    found = _by_species(sequences, species)
    by_species = {
        name: compare(Spectrum.of(found[name]), spectrum)
        for name, spectrum in reference.by_species.items()
        if name in found
    }
    return GenomeMetrics(
        overall=compare(Spectrum.of(sequences), reference.overall),
        num_framed=sum(framed),
        num_distinct=len(set(sequences)),
        by_species=by_species,
        weighted_js_distance=_weighted(by_species, reference.by_species),
    )


def _by_species(sequences: Sequence[str], species: Sequence[str] | None) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    if species is not None:
        for name, sequence in zip(species, sequences, strict=True):
            groups.setdefault(name, []).append(sequence)
    return dict(sorted(groups.items()))


def _weighted(metrics: Mapping[str, SpectrumMetrics], spectra: Mapping[str, Spectrum]) -> dict[int, float]:
    weights = [len(spectrum.gc_N) for spectrum in spectra.values()]
    weighted = {}
    for k in KMER_LENGTHS:
        found = [metrics[name].kmers[k] for name in spectra if name in metrics]
        distances = [value.distance for value in found if value is not None]
        if distances and len(distances) == len(weights):
            weighted[k] = float(np.average(distances, weights=weights))
    return weighted


def compare(samples: Spectrum, reference: Spectrum) -> SpectrumMetrics:
    """One set of sequences against another one."""
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
    """How often each of the 4^k k-mers occurs, overlaps included, int64 (K,), in alphabetical order.

    A k-mer lies within one sequence, and has no letter but A, C, G and T.
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
    """Many short sequences at once, with an unknown letter between them."""
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
    """Fraction of G and C among the known letters of each sequence, float64 (N,); nan where none is known."""
    gc_N = np.full(len(sequences), np.nan)
    for row, sequence in enumerate(sequences):
        counts = {letter: sequence.count(letter) for letter in LETTERS}
        if known := sum(counts.values()):
            gc_N[row] = (counts["G"] + counts["C"]) / known
    return gc_N


def _digits(sequence: str) -> np.ndarray:
    """0 to 3 for A, C, G, T, and 4 for anything else, int8 (L,)."""
    return _DIGITS[np.frombuffer(sequence.encode("latin-1", "replace"), np.uint8)]
