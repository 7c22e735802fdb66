"""MOSES' metrics of generated molecules (Polykovskiy et al., Front. Pharmacol. 2020, arXiv 1811.12823).

The protocol is 30,000 samples against the published sets `test` and `test_scaffolds`.

Legend: N generated molecules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import rdkit
from rich.console import Console
from scipy.stats import wasserstein_distance

from scmdm.evaluation.frechet import frechet_distance
from scmdm.evaluation.moses_sets import (
    PROPERTIES,
    Filters,
    SetStatistics,
    Wanted,
    cosine_similarity,
    examine,
    internal_diversity,
    nearest_similarity,
)

SAMPLES = 30_000  # of the protocol
UNIQUE_AT = (1_000, 10_000)
_CACHE_VERSION = 2


@dataclass(frozen=True)
class Comparison:
    """Of the valid molecules with one reference set."""

    fcd: float | None  # the lower the better; biased upwards for few molecules; None: not asked for
    snn: float  # mean similarity to the nearest molecule of the reference
    frag: float | None  # cosine similarity of fragment counts; None: nothing to count
    scaf: float | None  # of scaffold counts

    @classmethod
    def of(cls, found: SetStatistics, reference: SetStatistics, device: str = "cpu") -> Comparison:
        a, b = found.activations, reference.activations
        return cls(
            frechet_distance(a, b) if a is not None and b is not None and a.count > 1 else None,
            float(nearest_similarity(found.fingerprints_NW, reference.fingerprints_NW, device).mean()),
            cosine_similarity(found.fragments, reference.fragments),
            cosine_similarity(found.scaffolds, reference.scaffolds),
        )


@dataclass(frozen=True)
class MosesReference:
    """What samples are compared with; make it once for many evaluations."""

    train: frozenset[str]
    test: SetStatistics
    test_scaffolds: SetStatistics | None
    filters: Filters | None

    @property
    def fcd(self) -> bool:
        """Whether the FCD is known."""
        return self.test.activations is not None

    @classmethod
    def make(
        cls,
        train: Sequence[str],
        test: Sequence[str],
        test_scaffolds: Sequence[str] | None = None,
        filters: Filters | None = None,
        *,
        fcd: bool,
        workers: int = 1,
    ) -> MosesReference:
        """Of any data set, its SMILES canonical."""
        others = None
        if test_scaffolds is not None:
            others = examine(test_scaffolds, Wanted(fcd, properties=False), workers=workers).statistics
        return cls(frozenset(train), examine(test, Wanted(fcd), workers=workers).statistics, others, filters)

    @classmethod
    def published(cls, *, fcd: bool, workers: int = 1) -> MosesReference:
        """The benchmark's own, from the package molsets; statistics of the test sets are kept in the user's cache.

        Raises UserError when the package cannot be fetched.
        """
        from data_prep.moses import moses_folder, read_smiles

        folder = moses_folder()
        name = f"statistics-{_CACHE_VERSION}-rdkit-{rdkit.__version__}{'-fcd' if fcd else ''}"

        def statistics(split: str) -> SetStatistics:
            path = folder.parent / f"{folder.name}-{name}" / f"{split}.npz"
            if not path.is_file():
                smiles, title = read_smiles(split), f"MOSES' {split}"
                note = f"{title}: statistics of {len(smiles):,} molecules, once, by {workers} processes: minutes each"
                Console(stderr=True).print(note, highlight=False)
                wanted = Wanted(fcd, properties=split == "test")
                examine(smiles, wanted, workers=workers, title=title).statistics.save(path)
            return SetStatistics.load(path)

        train = frozenset(read_smiles("train"))
        return cls(train, statistics("test"), statistics("test_scaffolds"), Filters.read(folder))


@dataclass(frozen=True)
class MosesMetrics:
    """MOSES' table. All but `valid` is about the valid molecules, repetitions included; None: not known."""

    num_samples: int
    num_valid: int
    unique: dict[int, float | None]  # of the first so many valid ones; None where there are fewer
    novelty: float | None  # of the distinct ones, that are not in the training set
    filters: float | None  # that pass them
    int_div: float | None
    int_div_2: float | None
    test: Comparison | None
    test_scaffolds: Comparison | None
    property_distances: dict[str, float]  # 1-Wasserstein, in units of the property, from the test set
    properties: dict[str, np.ndarray]  # (N,) each, for figures

    def as_dict(self) -> dict[str, Any]:
        """Under MOSES' names; without the properties of each molecule."""
        comparisons = {
            f"{label}/{suffix}": getattr(comparison, label.lower()) if comparison is not None else None
            for suffix, comparison in (("Test", self.test), ("TestSF", self.test_scaffolds))
            for label in ("FCD", "SNN", "Frag", "Scaf")
        }
        return {
            "num_samples": self.num_samples,
            "num_valid": self.num_valid,
            "valid": self.num_valid / self.num_samples if self.num_samples else 0.0,
            **{f"unique@{k}": value for k, value in self.unique.items()},
            **comparisons,
            "IntDiv": self.int_div,
            "IntDiv2": self.int_div_2,
            "Filters": self.filters,
            **{name: self.property_distances.get(name) for name in PROPERTIES},
            "Novelty": self.novelty,
        }


def evaluate_moses(
    smiles: Sequence[str],
    framed: Sequence[bool],
    reference: MosesReference,
    *,
    workers: int = 1,
    device: str = "cpu",
    means_of: int = SAMPLES,
    title: str | None = None,
) -> MosesMetrics:
    """All metrics of generated SMILES; `device` makes the similarities.

    Valid: RDKit reads it, it is one string and not empty, and the sample is `framed` as the data is, a condition that
    MOSES' own models cannot fail. Of fewer than two valid molecules nothing but counts is known. What is a mean over
    molecules (SNN, IntDiv, filters, properties) is taken of at most `means_of` samples, evenly spaced: of more it is
    the same number, but for noise, and takes hours. `title`: see `examine`.
    """
    samples = [text if ok else None for text, ok in zip(smiles, framed, strict=True)]
    wanted = Wanted(reference.fcd, filters=reference.filters, every=math.ceil(len(samples) / means_of) or 1)
    examined = examine(samples, wanted, workers=workers, title=title) if samples else None
    valid = [text for text in examined.canonical if text is not None] if examined is not None else []
    unique = {k: len(set(valid[:k])) / k if len(valid) >= k else None for k in UNIQUE_AT}
    novelty = len(set(valid) - reference.train) / len(set(valid)) if valid else None
    if examined is None or len(examined.statistics.fingerprints_NW) < 2:
        return MosesMetrics(len(smiles), len(valid), unique, novelty, None, None, None, None, None, {}, {})
    found, others = examined.statistics, reference.test_scaffolds
    return MosesMetrics(
        len(smiles),
        len(valid),
        unique,
        novelty,
        None if reference.filters is None else examined.passed / examined.filtered,
        *internal_diversity(found.fingerprints_NW, device),
        Comparison.of(found, reference.test, device),
        None if others is None else Comparison.of(found, others, device),
        {
            name: float(wasserstein_distance(values_N, reference.test.properties[name]))
            for name, values_N in found.properties.items()
        },
        found.properties,
    )
