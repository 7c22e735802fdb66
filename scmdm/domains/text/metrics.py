"""Metrics of generated text: entropy, distinct n-grams, and generative perplexity under a named scorer.

Legend: N texts, L length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scmdm.domains.sample_values import SampleValues
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


def unigram_entropies(ids_NL: np.ndarray, pad_id: int) -> list[float]:
    """Entropy (nats) of token frequencies within each sequence, without padding; 0 for padding alone."""
    entropies = []
    for row_L in ids_NL:
        _, counts = np.unique(row_L[row_L != pad_id], return_counts=True)
        p = counts / max(1, counts.sum())
        entropies.append(float(-(p * np.log(p)).sum()))
    return entropies


def distinct_n(texts: Sequence[str], n: int) -> SampleValues:
    """Fraction of distinct n-grams of words among all of them, over all texts.

    The parts are each text's n-grams that no text before has.
    """
    seen: set[tuple[str, ...]] = set()
    new, total = [], []
    for words in (text.split() for text in texts):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        before = len(seen)
        seen.update(grams)
        new.append(len(seen) - before)
        total.append(len(grams))
    return SampleValues.ratio(new, total)


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


def text_values(
    texts: Sequence[str], ids_NL: np.ndarray, pad_id: int, scorer: CausalScorer | NgramScorer, *, device: str
) -> dict[str, SampleValues]:
    """Values of all metrics of texts and their ids (N, L). `scorer` is an n-gram or a causal model."""
    if isinstance(scorer, NgramScorer):
        scores = [scorer.model.log_prob(text) for text in texts]
        perplexity = SampleValues.ratio([-log_p for log_p, _ in scores], [n for _, n in scores], exponential=True)
    else:
        perplexity = generative_perplexity(texts, scorer, device=device)
    return {
        "perplexity": perplexity,
        "entropy": SampleValues.mean(unigram_entropies(ids_NL, pad_id)),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
    }


def evaluate_text(values: Mapping[str, SampleValues], scorer: CausalScorer | NgramScorer) -> TextMetrics:
    """Compute all metrics from the values of `text_values`."""
    if isinstance(scorer, NgramScorer):
        label = scorer.label
    else:
        length = scorer.length
        label = f"{scorer.path.name} (transformers{'' if length == SCORER_LENGTH else f', the first {length} tokens'})"
    entropy = values["entropy"]
    one, two, three = (values[f"distinct_{n}"].value() or 0.0 for n in (1, 2, 3))
    return TextMetrics(len(entropy.array), entropy.value() or 0.0, one, two, three, values["perplexity"].value(), label)


def generative_perplexity(
    texts: Sequence[str],
    scorer: CausalScorer,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    max_length: int = SCORER_LENGTH,
) -> SampleValues:
    """Perplexity per token of the scorer, following MDLM, as values of each text.

    Texts are tokenized by the scorer and truncated to `max_length` or to the scorer's positions; the mean is weighted
    by tokens. A text of fewer than two tokens has weight 0.
    """
    model, tokenizer = scorer.model.to(device), scorer.tokenizer
    max_length = min(max_length, scorer.length)
    encoded = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    nll_N, count_N = np.zeros(len(texts)), np.zeros(len(texts))
    # Sort by length, so that batches contain little padding.
    order = sorted((index for index, ids in enumerate(encoded) if len(ids) >= 2), key=lambda index: len(encoded[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        nll_N[chosen], count_N[chosen] = _score(model, [encoded[index] for index in chosen], device)
    return SampleValues.ratio(nll_N, count_N, exponential=True)


@torch.no_grad()
def _score(model: Any, rows: Sequence[Sequence[int]], device: str) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, rows))
    ids_NL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    present_NL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    logits: Tensor = model(input_ids=ids_NL, attention_mask=present_NL).logits.float()
    log_p = logits[:, :-1].log_softmax(-1).gather(2, ids_NL[:, 1:, None]).squeeze(2)
    counted = present_NL[:, 1:]
    return -(log_p * counted).sum(1).cpu().numpy(), counted.sum(1).cpu().numpy()
