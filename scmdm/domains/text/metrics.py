"""Metrics of generated text: entropy, distinct n-grams, and generative perplexity under a named scorer.

Legend: N texts, L length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scmdm.domains.text.ngram import NgramModel
from scmdm.errors import UserError

NGRAM_ORDER = 5
SCORER_LENGTH = 1024  # tokens of a text that the scorer reads, as in MDLM


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
    texts: Sequence[str], ids_NL: np.ndarray, pad_id: int, scorer: Path | NgramScorer, *, device: str
) -> TextMetrics:
    """Compute all metrics of texts and their ids (N, L). `scorer` is an n-gram model or a causal model's directory."""
    if isinstance(scorer, NgramScorer):
        perplexity, label = scorer.model.perplexity(texts), scorer.label
    else:
        perplexity, length = generative_perplexity(texts, scorer, device=device), scorer_length(scorer)
        label = f"{scorer.name} (transformers{'' if length == SCORER_LENGTH else f', the first {length} tokens'})"
    one, two, three = (distinct_n(texts, n) for n in (1, 2, 3))
    known = None if math.isnan(perplexity) else perplexity
    return TextMetrics(len(texts), unigram_entropy(ids_NL, pad_id), one, two, three, known, label)


def generative_perplexity(
    texts: Sequence[str], scorer: Path, *, device: str = "cpu", batch_size: int = 16, max_length: int = SCORER_LENGTH
) -> float:
    """Perplexity per token of the scorer, following MDLM.

    Texts are tokenized by the scorer and truncated to `max_length` or to the scorer's positions; the mean is weighted
    by tokens. Returns nan if no text has two tokens. Raises UserError if `scorer` is not the directory of a causal
    model with its tokenizer.
    """
    model, tokenizer = load_scorer(scorer)
    model.to(device).eval()
    nll, count = 0.0, 0
    max_length = min(max_length, scorer_length(scorer))
    encoded = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    # Sort by length, so that batches contain little padding.
    rows = sorted((ids for ids in encoded if len(ids) >= 2), key=len)
    for start in range(0, len(rows), batch_size):
        batch_nll, batch_count = _score(model, rows[start : start + batch_size], device)
        nll, count = nll + batch_nll, count + batch_count
    return math.exp(nll / count) if count else float("nan")


def scorer_length(scorer: Path) -> int:
    """Number of tokens of a text that are scored: `SCORER_LENGTH` or, if fewer, the model's positions."""
    config = json.loads((scorer / "config.json").read_text())
    known = [config[key] for key in ("n_positions", "max_position_embeddings") if isinstance(config.get(key), int)]
    return min([SCORER_LENGTH, *known])


def check_scorer(scorer: Path) -> None:
    """Raise UserError unless `scorer` looks like the directory of a transformers model."""
    if not (scorer / "config.json").is_file():
        raise UserError(
            f"metrics.scorer={scorer} is not the directory of a transformers model (no config.json); give a local one"
        )


def load_scorer(scorer: Path) -> tuple[Any, Any]:
    """Load a causal model and its tokenizer from a local directory. Raises UserError if that fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_scorer(scorer)
    try:
        tokenizer = AutoTokenizer.from_pretrained(scorer, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(scorer, local_files_only=True, use_safetensors=True), tokenizer
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"metrics.scorer={scorer} is not a causal model with its tokenizer ({reason}); give such a directory"
        ) from error


@torch.no_grad()
def _score(model: Any, rows: Sequence[Sequence[int]], device: str) -> tuple[float, int]:
    longest = max(map(len, rows))
    ids_NL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    present_NL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    logits: Tensor = model(input_ids=ids_NL, attention_mask=present_NL).logits.float()
    log_p = logits[:, :-1].log_softmax(-1).gather(2, ids_NL[:, 1:, None]).squeeze(2)
    counted = present_NL[:, 1:]
    return float(-(log_p * counted).sum()), int(counted.sum())
