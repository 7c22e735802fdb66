"""The domain of images, as sequences of pixel levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import LevelTokenizer, Tokenizer
from scmdm.domains.images.config import ImageMetricKeys
from scmdm.domains.images.figures import image_grid
from scmdm.domains.images.metrics import ImageReference, measure_images
from scmdm.domains.interface import (
    EvaluationSettings,
    GeneratedSamples,
    Measured,
    Metric,
    MetricKeys,
    WithoutFigures,
    WithoutPrompts,
    with_floor,
)
from scmdm.system.package_data import user_cache


class ImagesDomain(WithoutPrompts, WithoutFigures):
    """Frechet distances, Inception Score and copies of training images."""

    name: ClassVar[str] = "images"
    Config: ClassVar[type[MetricKeys]] = ImageMetricKeys
    metrics: ClassVar[tuple[Metric, ...]] = (
        *with_floor(
            Metric("frechet_classifier", "Fréchet distance in features of a classifier (not FID)", "lower", 1, 3),
            "Fréchet distance of an equal number of training images",
        ),
        Metric("class_distance", "total variation distance of classes", "lower", 1, 3),
        Metric("fid", "FID", "lower", 1, 2),
        Metric("inception_score", "Inception Score", "higher", 1, 2),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
        Metric("copies", "copies of training images, %", "lower", 100, 2, in_figure=False),
        Metric("memorised", "memorised, %", "lower", 100, 2, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, config: ImageMetricKeys, settings: EvaluationSettings) -> None:
        inception = Path(config.inception) if config.inception is not None else None
        work = user_cache("classifiers")
        work.mkdir(parents=True, exist_ok=True)
        self._reference = ImageReference.make(
            root, settings.split, work=work, inception=inception, device=settings.device
        )

    def measure(self, drawn: GeneratedSamples) -> Measured:
        return measure_images(drawn.tokens.numpy(), self._reference)

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        assert isinstance(tokenizer, LevelTokenizer)
        count = image_grid(tokenizer.pictures(np.array([row["tokens"] for row in rows])), path)
        return f"the first {count} samples"
