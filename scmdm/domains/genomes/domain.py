"""The domain of DNA windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from scmdm.data.loader import read_labels
from scmdm.data.manifest import Manifest
from scmdm.domains.genomes.figures import genome_figure
from scmdm.domains.genomes.metrics import GenomeReference, Spectrum, evaluate_genomes, genome_values
from scmdm.domains.interface import (
    EvaluationSettings,
    GeneratedSamples,
    Measured,
    Metric,
    MetricKeys,
    WithoutFigures,
    WithoutPrompts,
    decode_split,
)


class GenomesDomain(WithoutPrompts, WithoutFigures):
    """K-mer spectra, GC content and open reading frames.

    The distances of real data fall with the sample size (docs/guides/genomes.md).
    """

    name: ClassVar[str] = "genomes"
    Config: ClassVar[type[MetricKeys]] = MetricKeys
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("js_distance_6", "Jensen-Shannon distance of 6-mers", "lower", 1, 4),
        Metric("js_distance_3", "Jensen-Shannon distance of 3-mers", "lower", 1, 4),
        Metric("js_divergence_6", "Jensen-Shannon divergence of 6-mers, nats", "lower", 1, 5, in_figure=False),
        Metric("js_divergence_3", "Jensen-Shannon divergence of 3-mers, nats", "lower", 1, 5, in_figure=False),
        *(
            Metric(
                f"weighted_js_{kind}_{k}",
                f"Jensen-Shannon {kind} of {k}-mers by species{note}",
                "lower",
                1,
                digits,
                in_figure=False,
            )
            for kind, digits, note in (("distance", 4, " (published)"), ("divergence", 5, ", nats"))
            for k in (6, 3)
        ),
        Metric(
            "open_frame",
            "with an open reading frame, % of samples",
            "higher",
            100,
            1,
            " % with an open reading frame",
        ),
        Metric("open_frame_reference", "open reading frame, % of held-out windows", "", 100, 1, in_figure=False),
        Metric("open_distance", "Wasserstein distance of the longest open reading stretch, codons", "lower", 1, 2),
        Metric("gc_distance", "Wasserstein distance of GC content", "lower", 1, 4),
        Metric("gc_mean", "mean GC content", "", 1, 4, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, config: MetricKeys, settings: EvaluationSettings) -> None:
        species = [manifest.labels[label] for label in read_labels(root, settings.split)] if manifest.labels else None
        self._reference = GenomeReference.make(decode_split(root, manifest, settings.split), species)

    def measure(self, drawn: GeneratedSamples) -> Measured:
        metrics = evaluate_genomes(drawn.texts, drawn.framed, self._reference, drawn.labels)
        return Measured(metrics, genome_values(drawn.texts, self._reference))

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        spectra = {name: Spectrum.of([row["text"] for row in rows if row["framed"]]) for name, rows in sets.items()}
        held_out, *_ = spectra
        genome_figure(spectra.pop(held_out), spectra, path)
        return "GC content and 3-mers of samples and held-out windows"
