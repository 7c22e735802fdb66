"""The k most probable tokens of a large vocabulary, without sorting it.

Legend: N positions, D width, V vocabulary, M blocks of it, K tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 64


def top_tokens(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits (N, K) of the `k` largest, largest first, and their ids (N, K), as `topk` gives them but for ties.

    They lie in the `k` blocks of the vocabulary with the largest maxima: one pass over the logits finds those, and
    sorting is left to a few hundred numbers. Differentiable by the logits.
    """
    vocab_size = logits_NV.shape[1]
    blocks = vocab_size // _BLOCK
    if blocks <= 2 * k:
        best = logits_NV.topk(min(k, vocab_size), dim=1)
        return best.values, best.indices
    with torch.no_grad():
        ids = _candidates(logits_NV, blocks, k)
        at_NK = logits_NV.gather(1, ids).topk(k, dim=1).indices
        ids_NK = ids.gather(1, at_NK)
    return logits_NV.gather(1, ids_NK), ids_NK


def mean_of_best(logits_NV: Tensor, embedding_VD: Tensor, k: int) -> Tensor:
    """Mean (N, D) of the embeddings of the `k` most probable tokens, weighted by their renormalised probabilities."""
    best_NK, ids_NK = top_tokens(logits_NV, k)
    p_NK = best_NK.float().softmax(1).to(embedding_VD.dtype)
    return F.embedding_bag(ids_NK, embedding_VD, per_sample_weights=p_NK, mode="sum")


def _candidates(logits_NV: Tensor, blocks: int, k: int) -> Tensor:
    """Ids of the tokens of `k` blocks, and of those behind the last whole block."""
    # A block is every `blocks`-th token: neighbours then belong to different ones, whose maxima one instruction makes.
    maxima_NM = logits_NV[:, : blocks * _BLOCK].unflatten(1, (_BLOCK, blocks)).amax(1)
    inside = torch.arange(0, blocks * _BLOCK, blocks, device=logits_NV.device)
    chosen = (maxima_NM.topk(k, dim=1).indices[:, :, None] + inside).flatten(1)
    rest = torch.arange(blocks * _BLOCK, logits_NV.shape[1], device=logits_NV.device)
    return torch.cat([chosen, rest.expand(len(logits_NV), -1)], 1)
