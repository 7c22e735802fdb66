"""The domain of responses to prompts, which measures the text after the prompt.

A model draws one response to each of the first prompts of the held-out split. The same metrics are computed for the
held-out responses to the same prompts. Of a conversation, the prompt is all that precedes its last answer.

Legend: N samples, L sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from scmdm.data.loader import read_columns
from scmdm.data.manifest import Manifest
from scmdm.data.shard_index import COLUMN, GIVEN, GIVEN_MASK
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.domains.interface import EvaluationSettings, GeneratedSamples, Measured, Metric, MetricKeys, WithoutFigures
from scmdm.domains.sample_values import SampleValues
from scmdm.domains.text.causal_scorer import CausalScorer, load_scorer
from scmdm.domains.text.config import TextMetricKeys
from scmdm.domains.text.mauve_score import mauve
from scmdm.domains.text.metrics import NgramScorer, evaluate_text, text_perplexity, text_values
from scmdm.errors import UserError

_MAX_FITTED = 20_000  # maximum number of training responses that the n-gram model is fitted to


class ResponsesDomain(WithoutFigures):
    """Generative perplexity, entropy, distinct n-grams and MAUVE of responses."""

    name: ClassVar[str] = "responses"
    Config: ClassVar[type[MetricKeys]] = TextMetricKeys
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("perplexity", "generative perplexity of responses", "lower", 1, 2, frontier="y"),
        Metric("perplexity_held_out", "perplexity of held-out responses", "", 1, 2, in_figure=False),
        Metric("entropy", "entropy, nats", "", 1, 3, frontier="x"),
        Metric("entropy_held_out", "entropy of held-out responses, nats", "", 1, 3, in_figure=False),
        Metric("mauve", "MAUVE", "higher", 1, 3),
        Metric("distinct_2", "distinct bigrams", "higher", 1, 3),
        Metric("distinct_2_held_out", "distinct bigrams of held-out responses", "", 1, 3, in_figure=False),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, config: TextMetricKeys, settings: EvaluationSettings) -> None:
        if not manifest.has_prompts:
            raise UserError(f"domain=responses needs a data set of prompts or chats; {root} has {manifest.framing}")
        if config.protocol != "text":
            raise UserError(f"metrics.protocol={config.protocol} is of whole samples; for responses it must be text")
        self._root, self._manifest, self._config, self._settings = root, manifest, config, settings
        self._tokenizer = load_tokenizer(root / manifest.tokenizer.file)
        # Loaded here: a scorer that cannot be used is refused before anything is sampled for it.
        self._causal = load_scorer(Path(config.scorer)) if config.scorer is not None else None

    @cached_property
    def _scorer(self) -> CausalScorer | NgramScorer:
        if self._causal is not None:
            return self._causal
        rows, given_N = _rows(self._root, self._manifest, "train", _MAX_FITTED)
        return NgramScorer.fit(extract_responses(rows, given_N, self._tokenizer)[0], "training responses")

    @staticmethod
    def templates(root: Path, manifest: Manifest, split: str, num: int) -> Tensor | None:
        rows, given_N = _rows(root, manifest, split, num)
        tokenizer = load_tokenizer(root / manifest.tokenizer.file)
        hidden_NL = np.arange(rows.shape[1]) >= given_N[:, None]
        return torch.from_numpy(np.where(hidden_NL, tokenizer.mask_id, rows))

    def measure(self, drawn: GeneratedSamples) -> Measured:
        count = len(drawn.tokens)
        real_NL, given_N = _rows(self._root, self._manifest, self._settings.split, count)
        texts, ids_NL = extract_responses(drawn.tokens.numpy(), given_N, self._tokenizer)
        values = self._text_values(texts, ids_NL)
        found = evaluate_text(values, self._scorer)
        real_texts, real_ids_NL = extract_responses(real_NL, given_N, self._tokenizer)
        held_out = evaluate_text(self._text_values(real_texts, real_ids_NL), self._scorer)
        found |= {f"{name}_held_out": held_out[name] for name in held_out if name not in ("num_samples", "scorer")}
        found |= {"framed": sum(drawn.framed) / count, "empty": sum(not text.strip() for text in texts)}
        if self._config.mauve:
            assert isinstance(self._scorer, CausalScorer)
            found["mauve"] = mauve(texts, real_texts, self._scorer, device=self._settings.device)
        return Measured(found, values | {"framed": SampleValues.mean(np.array(drawn.framed, bool))})

    def _text_values(self, texts: Sequence[str], ids_NL: np.ndarray) -> dict[str, SampleValues]:
        perplexity = text_perplexity(texts, self._scorer, device=self._settings.device)
        return text_values(texts, ids_NL, self._tokenizer.pad_id, perplexity)


def extract_responses(rows_NL: np.ndarray, given_N: np.ndarray, tokenizer: Tokenizer) -> tuple[list[str], np.ndarray]:
    """Return texts between a prompt of `given_N` ids and the first end token, and their ids (N, L), padded."""
    ids_NL = np.full(rows_NL.shape, tokenizer.pad_id, np.int64)
    for own, row, given in zip(ids_NL, rows_NL, given_N, strict=True):
        response = row[given:]
        ends = np.flatnonzero(np.isin(response, tokenizer.end_ids))
        response = response[: ends[0]] if len(ends) else response
        own[: len(response)] = response
    texts = [tokenizer.decode(row[row != tokenizer.pad_id].tolist()) for row in ids_NL]
    return texts, ids_NL


def _rows(root: Path, manifest: Manifest, split: str, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the first sequences (N, L) of a split, and the length (N,) of each prompt."""
    columns = read_columns(root, split, range(min(num, manifest.split(split, root).samples)))
    if COLUMN not in columns:
        return np.zeros((0, manifest.length), np.int64), np.zeros(0, np.int64)
    if manifest.framing == "prompts":
        return columns[COLUMN], columns[GIVEN]
    given_NL = columns[GIVEN_MASK]
    return columns[COLUMN], np.where(given_NL == 1, np.arange(1, given_NL.shape[1] + 1), 0).max(1)
