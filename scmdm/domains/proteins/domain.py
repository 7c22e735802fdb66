"""The domain of proteins, as sequences of amino acids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from scmdm.data.manifest import Manifest
from scmdm.domains.interface import (
    EvaluationSettings,
    GeneratedSamples,
    Measured,
    Metric,
    MetricKeys,
    WithoutFigures,
    WithoutPrompts,
    decode_split,
    with_floor,
)
from scmdm.domains.proteins.figures import protein_figure
from scmdm.domains.proteins.metrics import ProteinReference, is_protein, measure_proteins


def _distance(name: str, title: str, digits: int = 4) -> tuple[Metric, Metric]:
    metric = Metric(name, title, "lower", 1, digits, counted="num_valid")
    return with_floor(metric, f"{title}, equal number of training sequences")


class ProteinsDomain(WithoutPrompts, WithoutFigures):
    """Validity, n-gram and composition fidelity, lengths, novelty."""

    name: ClassVar[str] = "proteins"
    Config: ClassVar[type[MetricKeys]] = MetricKeys
    metrics: ClassVar[tuple[Metric, ...]] = (
        *_distance("js_distance_3", "Jensen-Shannon distance of 3-mers"),
        *_distance("js_distance_2", "Jensen-Shannon distance of 2-mers"),
        *_distance("js_distance_1", "Jensen-Shannon distance of amino-acid composition"),
        *_distance("length_distance", "Wasserstein distance of lengths, residues", 2),
        Metric("validity", "valid, % of samples", "higher", 100, 1, " % valid", maximum=1),
        Metric("uniqueness_of_samples", "valid and unique, % of samples", "higher", 100, 1, maximum=1, in_figure=False),
        Metric("novelty_of_unique", "novel, % of unique", "higher", 100, 1, maximum=1, in_figure=False),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, config: MetricKeys, settings: EvaluationSettings) -> None:
        train, held_out = (decode_split(root, manifest, split) for split in ("train", settings.split))
        self._reference = ProteinReference.make(train, held_out)

    def measure(self, drawn: GeneratedSamples) -> Measured:
        return measure_proteins(drawn.texts, drawn.framed, self._reference)

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        valid = {
            name: [row["text"] for row in rows if row["framed"] and is_protein(row["text"])]
            for name, rows in sets.items()
        }
        if not all(valid.values()):
            return None
        protein_figure(valid, path)
        return "lengths and amino-acid composition of the valid sequences"
