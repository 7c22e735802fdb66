"""The k most probable tokens of a large vocabulary, and the expected embedding over them.

Legend: N positions, C positions of a chunk, D width, V vocabulary, M blocks of the vocabulary, K tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scmdm.ops.confidence import confidence_of

_BLOCK = 64  # tokens of a block


def top_tokens(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` largest logits (N, K), in descending order, and their ids (N, K).

    Equals `torch.topk`, except for the order of ties. Differentiable with respect to the logits. A vocabulary of more
    than `2 k` blocks is searched by `_blocked_top_tokens`, which is faster than `torch.topk` there.
    """
    if logits_NV.shape[1] // _BLOCK > 2 * k:
        return _blocked_top_tokens(logits_NV, k)
    best = logits_NV.topk(min(k, logits_NV.shape[1]), dim=1)
    return best.values, best.indices


def _blocked_top_tokens(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute `top_tokens` in two steps: the `k` blocks with the largest maxima contain all `k` tokens."""
    with torch.no_grad():
        ids = _candidates(logits_NV, k)
        ids_NK = ids.gather(1, logits_NV.gather(1, ids).topk(k, dim=1).indices)
    return logits_NV.gather(1, ids_NK), ids_NK


def _candidates(logits_NV: Tensor, k: int) -> Tensor:
    """Return the ids of the tokens in the `k` blocks with the largest maxima, and after the last whole block."""
    blocks = logits_NV.shape[1] // _BLOCK
    # Block m holds the tokens m, m + blocks, m + 2 blocks, ...: maxima over strided blocks vectorise.
    maxima_NM = logits_NV[:, : blocks * _BLOCK].unflatten(1, (_BLOCK, blocks)).amax(1)
    inside = torch.arange(0, blocks * _BLOCK, blocks, device=logits_NV.device)
    chosen = (maxima_NM.topk(k, dim=1).indices[:, :, None] + inside).flatten(1)
    rest = torch.arange(blocks * _BLOCK, logits_NV.shape[1], device=logits_NV.device)
    return torch.cat([chosen, rest.expand(len(logits_NV), -1)], 1)


def top_k_embedding(logits_NV: Tensor, embedding_VD: Tensor, k: int) -> Tensor:
    """Return the expected embedding (N, D) over the `k` most probable tokens, with their probabilities renormalised."""
    best_NK, ids_NK = top_tokens(logits_NV, k)
    p_NK = best_NK.float().softmax(1).to(embedding_VD.dtype)
    return F.embedding_bag(ids_NK, embedding_VD, per_sample_weights=p_NK, mode="sum")


def chunked_top_k_embedding(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    embedding_VD: Tensor,
    k: int,
    confidence: str | None = None,
    *,
    chunk: int,
) -> Tensor:
    """Compute `top_k_embedding` (N, D) of the logits `W h + b`, `chunk` positions at a time, without gradients.

    With `confidence` one more column is the confidence of that kind. States, weight and bias have one dtype; weight and
    bias may be padded beyond the rows of the embedding.
    """
    # All chunks share one buffer of logits: on a CPU, mapping new pages takes half as long as the product.
    buffer_CV, parts = h_ND.new_empty(min(chunk, len(h_ND)), len(bias_V)), []
    for h_CD in h_ND.split(chunk):
        logits_CV = torch.addmm(bias_V, h_CD, weight_VD.T, out=buffer_CV[: len(h_CD)])
        parts.append(top_k_embedding(logits_CV[:, : len(embedding_VD)], embedding_VD, k))
        if confidence is not None:
            found_C1 = confidence_of(logits_CV, confidence, len(embedding_VD) - 1)
            parts[-1] = torch.cat([parts[-1], found_C1.to(embedding_VD.dtype)], 1)
    return torch.cat(parts)
