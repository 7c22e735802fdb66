"""Metrics of generated text: entropy, distinct n-grams, and generative perplexity under a named scorer.

Legend: N texts, L length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scmdm.domains.text.causal_scorer import SCORER_LENGTH, CausalScorer
from scmdm.domains.text.ngram import NgramModel

NGRAM_ORDER = 5


@dataclass(frozen=True)
class TextMetrics:
    """`perplexity` is per token of `scorer`. A low value with a low `entropy` indicates repetition."""

    num_samples: int
    entropy: float  # nats
    distinct_1: float
    distinct_2: float
    distinct_3: float
    perplexity: float | None  # None if no text is long enough to be scored
    scorer: str

    def as_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def unigram_entropy(ids_NL: np.ndarray, pad_id: int) -> float:
    """Mean over sequences of the entropy (nats) of token frequencies within the sequence, without padding.

    A sequence of padding alone has entropy 0.
    """
    entropies = []
    for row_L in ids_NL:
        _, counts = np.unique(row_L[row_L != pad_id], return_counts=True)
        p = counts / max(1, counts.sum())
        entropies.append(float(-(p * np.log(p)).sum()))
    return float(np.mean(entropies))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Fraction of distinct n-grams of words among all of them, over all texts; 0 without n-grams."""
    grams = [tuple(words[i : i + n]) for text in texts for words in [text.split()] for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class NgramScorer:
    """Scorer that is used without a neural model. Fit it once for many evaluations."""

    model: NgramModel
    label: str

    @classmethod
    def fit(cls, texts: Sequence[str], description: str) -> NgramScorer:
        """Fit the n-gram model to `texts`, whose `description` appears in the label."""
        label = f"Kneser-Ney {NGRAM_ORDER}-gram of characters fitted on {description} (not a neural scorer)"
        return cls(NgramModel.fit(texts, order=NGRAM_ORDER), label)


def evaluate_text(
    texts: Sequence[str], ids_NL: np.ndarray, pad_id: int, scorer: CausalScorer | NgramScorer, *, device: str
) -> TextMetrics:
    """Compute all metrics of texts and their ids (N, L). `scorer` is an n-gram or a causal model."""
    if isinstance(scorer, NgramScorer):
        perplexity, label = scorer.model.perplexity(texts), scorer.label
    else:
        perplexity, length = generative_perplexity(texts, scorer, device=device), scorer.length
        label = f"{scorer.path.name} (transformers{'' if length == SCORER_LENGTH else f', the first {length} tokens'})"
    one, two, three = (distinct_n(texts, n) for n in (1, 2, 3))
    known = None if math.isnan(perplexity) else perplexity
    return TextMetrics(len(texts), unigram_entropy(ids_NL, pad_id), one, two, three, known, label)


def generative_perplexity(
    texts: Sequence[str],
    scorer: CausalScorer,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    max_length: int = SCORER_LENGTH,
) -> float:
    """Perplexity per token of the scorer, following MDLM.

    Texts are tokenized by the scorer and truncated to `max_length` or to the scorer's positions; the mean is weighted
    by tokens. Returns nan if no text has two tokens.
    """
    model, tokenizer = scorer.model.to(device), scorer.tokenizer
    nll, count = 0.0, 0
    max_length = min(max_length, scorer.length)
    encoded = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    # Sort by length, so that batches contain little padding.
    rows = sorted((ids for ids in encoded if len(ids) >= 2), key=len)
    for start in range(0, len(rows), batch_size):
        batch_nll, batch_count = _score(model, rows[start : start + batch_size], device)
        nll, count = nll + batch_nll, count + batch_count
    return math.exp(nll / count) if count else float("nan")


@torch.no_grad()
def _score(model: Any, rows: Sequence[Sequence[int]], device: str) -> tuple[float, int]:
    longest = max(map(len, rows))
    ids_NL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    present_NL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    logits: Tensor = model(input_ids=ids_NL, attention_mask=present_NL).logits.float()
    log_p = logits[:, :-1].log_softmax(-1).gather(2, ids_NL[:, 1:, None]).squeeze(2)
    counted = present_NL[:, 1:]
    return float(-(log_p * counted).sum()), int(counted.sum())
