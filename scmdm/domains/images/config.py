"""Keys of the image metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scmdm.config.fields import PathKind, key
from scmdm.domains.images.inception import check_inception
from scmdm.domains.interface import MetricKeys


@dataclass
class ImageMetricKeys(MetricKeys):
    """Section `metrics` for models of images."""

    inception: str | None = key(
        None,
        path=PathKind.INPUT,
        help="file of Inception's weights, for FID and Inception Score; null: classifier trained on the data",
    )

    def validate(self) -> None:
        if self.inception is not None:
            check_inception(Path(self.inception))
