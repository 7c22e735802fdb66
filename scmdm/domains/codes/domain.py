"""The domain of codes of a VQ model or another discrete autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import LevelTokenizer, load_tokenizer
from scmdm.domains.codes.metrics import CodeReference, measure_codes
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
from scmdm.errors import UserError


class CodesDomain(WithoutPrompts, WithoutFigures):
    """Frequencies of codes and of neighbouring pairs."""

    name: ClassVar[str] = "codes"
    Config: ClassVar[type[MetricKeys]] = MetricKeys
    metrics: ClassVar[tuple[Metric, ...]] = (
        *with_floor(
            Metric(
                "pair_distance", "Jensen-Shannon distance of neighbouring codes", "lower", 1, 4, counted="num_framed"
            ),
            "pair distance of an equal number of training samples",
        ),
        *with_floor(
            Metric(
                "usage_distance", "Jensen-Shannon distance of code frequencies", "lower", 1, 4, counted="num_framed"
            ),
            "frequency distance of an equal number of training samples",
        ),
        *with_floor(
            Metric("codebook_used", "codebook in use, %", "", 100, 1),
            "codebook in use by an equal number of training samples, %",
        ),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
        Metric("copies", "copies of training samples, %", "lower", 100, 2, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, config: MetricKeys, settings: EvaluationSettings) -> None:
        tokenizer = load_tokenizer(root / manifest.tokenizer.file)
        if not isinstance(tokenizer, LevelTokenizer):
            raise UserError(f"domain=codes: {root} has the tokenizer {tokenizer.kind}; give a data set of codes")
        self._tokenizer = tokenizer
        train, held_out = (tokenizer.codes(read_split(root, split)) for split in ("train", settings.split))
        self._reference = CodeReference.make(train, held_out, tokenizer.layout.levels)

    def measure(self, drawn: GeneratedSamples) -> Measured:
        codes_NHW = self._tokenizer.codes(drawn.tokens.numpy())
        return measure_codes(codes_NHW, drawn.framed, self._reference)
