"""Metrics of generated text: entropy, distinct n-grams, and generative perplexity under a named scorer.

Legend: N texts, L length, M = L - 1 scored positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scmdm.data.tokenizers import Tokenizer
from scmdm.domains.sample_values import SampleValues, distinct_parts
from scmdm.domains.text.causal_scorer import SCORER_LENGTH, CausalScorer
from scmdm.domains.text.ngram import NgramModel

NGRAM_ORDER = 5
_CLEANED = (".", "?", "!", ",")  # marks that lose the space in front of them, and contractions
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_CONTRACTIONS = ("n't", "'m", "'s", "'ve", "'re")


def unigram_entropies(ids_NL: np.ndarray, pad_id: int) -> list[float]:
    """Entropy (nats) of token frequencies within each sequence, without padding; 0 for padding alone."""
    entropies = []
    for row_L in ids_NL:
        _, counts = np.unique(row_L[row_L != pad_id], return_counts=True)
        p = counts / max(1, counts.sum())
        entropies.append(float(-(p * np.log(p)).sum()))
    return entropies


def distinct_n(texts: Sequence[str], n: int) -> SampleValues:
    """Fraction of distinct n-grams of words among all of them, over all texts."""
    words = [text.split() for text in texts]
    grams = [[tuple(own[i : i + n]) for i in range(len(own) - n + 1)] for own in words]
    return SampleValues.ratio(distinct_parts(grams), [len(own) for own in grams])


def whole_words(text: str) -> list[str]:
    """Words of a text in lower case, without one at its beginning or end, where it may have been cut."""
    found = _WORD.finditer(text.lower())
    return [match.group() for match in found if match.start() > 0 and match.end() < len(text)]


def known_words(texts: Sequence[str], vocabulary: AbstractSet[str]) -> SampleValues:
    """Share of the whole words of all texts that are in a vocabulary, as values of each text."""
    words = [whole_words(text) for text in texts]
    return SampleValues.ratio([sum(word in vocabulary for word in own) for own in words], [len(own) for own in words])


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


def text_perplexity(texts: Sequence[str], scorer: CausalScorer | NgramScorer, *, device: str = "cpu") -> SampleValues:
    """Perplexity per unit of the scorer, an n-gram or a causal model, as values of each text."""
    if isinstance(scorer, CausalScorer):
        return generative_perplexity(texts, scorer, device=device)
    scores = [scorer.model.log_prob(text) for text in texts]
    return SampleValues.ratio([-log_p for log_p, _ in scores], [n for _, n in scores], exponential=True)


def text_values(
    texts: Sequence[str], ids_NL: np.ndarray, pad_id: int, perplexity: SampleValues
) -> dict[str, SampleValues]:
    """Values of all metrics of texts and their ids (N, L), given those of the perplexity."""
    return {
        "perplexity": perplexity,
        "entropy": SampleValues.mean(unigram_entropies(ids_NL, pad_id)),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
    }


def evaluate_text(
    values: Mapping[str, SampleValues], scorer: CausalScorer | NgramScorer, protocol: str = "text"
) -> dict[str, Any]:
    """Compute all metrics from the values of `text_values`. `protocol` is that of the perplexity, for its label.

    The perplexity is per token of the scorer, and None if no text is long enough to be scored. A low one with a low
    entropy indicates repetition.
    """
    if isinstance(scorer, NgramScorer):
        label = scorer.label
    else:
        length = scorer.length
        label = f"{scorer.path.name} (transformers{'' if length == SCORER_LENGTH else f', the first {length} tokens'})"
        label += "" if protocol == "text" else f", protocol {protocol}"
    distinct = {name: values[name].ratio_parts() for name in ("distinct_1", "distinct_2", "distinct_3")}
    return {
        "num_samples": len(values["entropy"].array),
        "entropy": values["entropy"].value() or 0.0,
        **{name: round(parts_N.sum()) / max(1.0, weights_N.sum()) for name, (parts_N, weights_N) in distinct.items()},
        "perplexity": values["perplexity"].value(),
        "scorer": label,
    }


def generative_perplexity(
    texts: Sequence[str],
    scorer: CausalScorer,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    max_length: int = SCORER_LENGTH,
) -> SampleValues:
    """Perplexity per token of the scorer, as values of each text.

    Texts are tokenized by the scorer and truncated to `max_length` or to the scorer's positions; the mean is weighted
    by tokens. The first token of a text is not scored. A text of fewer than two tokens has weight 0.
    """
    encoded = _encoded(texts, scorer, min(max_length, scorer.length))
    pieces = [_Piece(number, ids, [True] * (len(ids) - 1)) for number, ids in enumerate(encoded)]
    return _perplexity(pieces, len(texts), scorer, device, batch_size)


def mdlm_perplexity(
    ids_NL: np.ndarray,
    tokenizer: Tokenizer,
    scorer: CausalScorer,
    *,
    device: str = "cpu",
    batch_size: int = 16,
) -> SampleValues:
    """Generative perplexity as MDLM's and Duo's code computes it, as values of each sample.

    The text of a whole sample (`mdlm_text`) is tokenized by the scorer, truncated to the model's length L, and scored
    in chunks of the scorer's length. The tokens of a chunk count, except for its first one and for all ends of text
    but the first in the chunk. A sample that begins with [BOS] therefore has its first real token scored after an end
    of text, and no end of text counts. The mean is over the tokens of all samples.
    """
    end_id = scorer.tokenizer.eos_token_id
    texts = [mdlm_text(row, tokenizer, scorer.tokenizer.eos_token) for row in ids_NL.tolist()]
    pieces = []
    for number, ids in enumerate(_encoded(texts, scorer, ids_NL.shape[1])):
        for at in range(0, len(ids), scorer.length):
            chunk = ids[at : at + scorer.length]
            first_end = chunk.index(end_id) if end_id in chunk else None
            counted = [id_ != end_id or place == first_end for place, id_ in enumerate(chunk)]
            pieces.append(_Piece(number, chunk, counted[1:]))
    return _perplexity(pieces, len(texts), scorer, device, batch_size)


def mdlm_text(ids: Sequence[int], tokenizer: Tokenizer, end: str) -> str:
    """Text of a whole sample as MDLM's code decodes it: [BOS] and [EOS] are written as `end`, padding is left out.

    The code decodes with `transformers` 4.38, which removes the spaces in front of some marks and contractions.
    """
    marks, parts = (tokenizer.bos_id, tokenizer.eos_id), []
    for is_mark, group in groupby(ids, marks.__contains__):
        some = list(group)
        parts.append(end * len(some) if is_mark else tokenizer.decode(some))
    text = "".join(parts)
    for mark in _CLEANED:
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for contraction in _CONTRACTIONS:
        text = text.replace(f" {contraction}", contraction)
    return text


@dataclass(frozen=True)
class _Piece:
    """Ids of a text that the scorer sees together."""

    text: int  # index
    ids: Sequence[int]
    counted: Sequence[bool]  # of each id but the first


def _encoded(texts: Sequence[str], scorer: CausalScorer, length: int) -> list[list[int]]:
    return [scorer.tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]


def _perplexity(
    pieces: Sequence[_Piece], texts: int, scorer: CausalScorer, device: str, batch_size: int
) -> SampleValues:
    model = scorer.model.to(device)
    nll_N, count_N = np.zeros(texts), np.zeros(texts)
    # Sort by length, so that batches contain little padding.
    order = sorted((piece for piece in pieces if any(piece.counted)), key=lambda piece: len(piece.ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows_N = [piece.text for piece in chosen]
        np.add.at(nll_N, rows_N, _score(model, chosen, device))
        np.add.at(count_N, rows_N, [sum(piece.counted) for piece in chosen])
    return SampleValues.ratio(nll_N, count_N, exponential=True)


@torch.no_grad()
def _score(model: Any, pieces: Sequence[_Piece], device: str) -> np.ndarray:
    """Return the negative log-probability (N,) of the counted ids of each piece."""
    longest = max(len(piece.ids) for piece in pieces)
    padding = [longest - len(piece.ids) for piece in pieces]
    rows = list(zip(pieces, padding, strict=True))
    ids_NL = torch.tensor([[*piece.ids, *[0] * pad] for piece, pad in rows], device=device)
    present_NL = torch.tensor([[1] * len(piece.ids) + [0] * pad for piece, pad in rows], device=device)
    counted_NM = torch.tensor([[*piece.counted, *[False] * pad] for piece, pad in rows], device=device)
    logits: Tensor = model(input_ids=ids_NL, attention_mask=present_NL).logits.float()
    log_p_NM = logits[:, :-1].log_softmax(-1).gather(2, ids_NL[:, 1:, None]).squeeze(2)
    found: np.ndarray = -(log_p_NM * counted_NM).sum(1).cpu().numpy()
    return found
