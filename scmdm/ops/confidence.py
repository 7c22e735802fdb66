"""Confidence of a prediction: a number between 0 and 1; 0 is reserved for "there is no prediction".

Legend: N positions, V vocabulary with the mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 2.0**-20  # of a prediction; bfloat16 represents it
_LOGARITHM = -1e4  # in place of the logarithm of probability 0, whose product with 0 would not be a number


def confidence_of(logits_NV: Tensor, kind: str, tokens: int) -> Tensor:
    """Return the confidence (N, 1) of `softmax(logits)`, float32, of the given kind; all logits at once.

    - "top1": the largest probability.
    - "entropy": `1 - entropy / log(tokens)`, for a vocabulary of `tokens` without the mask.
    """
    log_p_NV = logits_NV.float().log_softmax(1)
    if kind == "top1":
        return bounded(log_p_NV.amax(1, keepdim=True).exp())
    entropy_N1 = -(log_p_NV.exp() * log_p_NV.clamp(min=_LOGARITHM)).sum(1, keepdim=True)
    return bounded(relative_entropy(entropy_N1, tokens))


def relative_entropy(entropy_N1: Tensor, tokens: int) -> Tensor:
    """Return 1 minus the entropy divided by that of a uniform distribution; 1 if there is only one token."""
    return 1 - entropy_N1 / math.log(tokens) if tokens > 1 else torch.ones_like(entropy_N1)


def bounded(confidence_N1: Tensor) -> Tensor:
    """Bound values that rounding has moved out of the range of a prediction's confidence."""
    return confidence_N1.clamp(LEAST, 1)
