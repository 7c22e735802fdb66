"""The domain of text, and of all kinds of sequences without their own domain."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import load_tokenizer
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
from scmdm.domains.sample_values import SampleValues
from scmdm.domains.text.causal_scorer import CausalScorer, load_scorer, require_end_of_text
from scmdm.domains.text.config import PlainTextMetricKeys
from scmdm.domains.text.mauve_score import mauve
from scmdm.domains.text.metrics import (
    NgramScorer,
    evaluate_text,
    known_words,
    mdlm_perplexity,
    text_perplexity,
    text_values,
    whole_words,
)


class TextDomain(WithoutPrompts, WithoutFigures):
    """Generative perplexity, entropy, distinct n-grams, known words and MAUVE."""

    name: ClassVar[str] = "text"
    Config: ClassVar[type[MetricKeys]] = PlainTextMetricKeys
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("perplexity", "generative perplexity", "lower", 1, 2, frontier="y"),
        Metric("entropy", "entropy, nats", "", 1, 3, frontier="x"),
        Metric("mauve", "MAUVE", "higher", 1, 3),
        Metric("known_words", "words of the training text, %", "higher", 100, 1),
        Metric("distinct_1", "distinct words", "higher", 1, 3, in_figure=False),
        Metric("distinct_2", "distinct bigrams", "higher", 1, 3),
        Metric("distinct_3", "distinct trigrams", "higher", 1, 3, in_figure=False),
    )

    def __init__(
        self, root: Path, manifest: Manifest, config: PlainTextMetricKeys, settings: EvaluationSettings
    ) -> None:
        self._config, self._device = config, settings.device
        # Blocks of concatenated texts have no padding, and the id of padding may be that of [EOS].
        self._pad_id = -1 if manifest.framing == "concatenate" or config.protocol == "mdlm" else manifest.padding_id
        self._tokenizer = load_tokenizer(root / manifest.tokenizer.file)
        needed = config.mauve or config.scorer is None
        # Loaded here: a scorer that cannot be used is refused before anything is sampled for it.
        causal = load_scorer(Path(config.scorer)) if config.scorer is not None else None
        if causal is not None and config.protocol == "mdlm":
            require_end_of_text(causal)
        self._held_out = decode_split(root, manifest, settings.split) if needed else []
        self._vocabulary: set[str] | None = None
        if config.known_words:
            training = decode_split(root, manifest, "train")
            self._vocabulary = {word for text in training for word in whole_words(text)}
        self._scorer = causal or NgramScorer.fit(self._held_out, "held-out text")

    def scores(self, drawn: GeneratedSamples) -> dict[str, np.ndarray]:
        scorer = self._scorer
        if isinstance(scorer, CausalScorer) and self._config.protocol == "mdlm":
            perplexity = mdlm_perplexity(drawn.tokens.numpy(), self._tokenizer, scorer, device=self._device)
        else:
            perplexity = text_perplexity(drawn.texts, scorer, device=self._device)
        nll_N, weight_N = perplexity.ratio_parts()
        return {"nll": nll_N, "weight": weight_N}

    def measure(self, drawn: GeneratedSamples) -> Measured:
        scorer, ids_NL = self._scorer, drawn.tokens.numpy()
        scores = self.scores(drawn) if drawn.scores is None else drawn.scores
        perplexity = SampleValues.ratio(scores["nll"], scores["weight"], exponential=True)
        values = text_values(drawn.texts, ids_NL, self._pad_id, perplexity)
        found = evaluate_text(values, scorer, self._config.protocol)
        if self._config.mauve:
            assert isinstance(scorer, CausalScorer)
            references = self._held_out[: len(drawn.texts)]
            found["mauve"] = mauve(drawn.texts, references, scorer, device=self._device)
        if self._vocabulary is not None:
            values["known_words"] = known_words(drawn.texts, self._vocabulary)
            found["known_words"] = values["known_words"].value()
        return Measured(found, values)
