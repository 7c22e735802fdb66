"""The k most probable tokens of a large vocabulary, without sorting it, and the estimate that they make.

Legend: N positions, C of them in a chunk, D width, V vocabulary, M blocks of it, K tokens, R axes of a preview.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scmdm.ops.preview import Preview

_BLOCK = 64
_CANDIDATES = 4  # of a preview, for each token that is wanted
_PREVIEWED = 1024  # positions at once: the rows of their candidates are as large as their logits


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


def estimate_of_best(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, embedding_VD: Tensor, k: int, rank: int | None, *, chunk: int
) -> Tensor:
    """`mean_of_best` (N, D) of `W h + b`, all three of one dtype, without gradients; in the dtype of `embedding_VD`.

    `rank` seeks the tokens in a preview along so many axes of the head, where that is less work. Weight and bias may be
    longer than the embedding.
    """
    preview = Preview.where_it_pays(weight_VD, rank, len(h_ND))
    if preview is not None:
        chunk = min(chunk, _PREVIEWED)
    # One block of logits for all chunks: new pages cost a CPU half as much as the product.
    block_CV, parts = h_ND.new_empty(min(chunk, len(h_ND)), len(bias_V)), []
    for h_CD in h_ND.split(chunk):
        logits_CV = block_CV[: len(h_CD)]
        if preview is None:
            torch.addmm(bias_V, h_CD, weight_VD.T, out=logits_CV)
            best = top_tokens(logits_CV[:, : len(embedding_VD)], k)
        else:
            torch.addmm(bias_V, h_CD @ preview.axes_DR, preview.weight_VR.T, out=logits_CV)
            seen = top_tokens(logits_CV[:, : len(embedding_VD)], _CANDIDATES * k)[1]
            best = _best_of(seen, h_CD, weight_VD, bias_V, k)
        parts.append(_mean(*best, embedding_VD))
    return torch.cat(parts)


def mean_of_best(logits_NV: Tensor, embedding_VD: Tensor, k: int) -> Tensor:
    """Mean (N, D) of the embeddings of the `k` most probable tokens, weighted by their renormalised probabilities."""
    return _mean(*top_tokens(logits_NV, k), embedding_VD)


def _best_of(ids_CK: Tensor, h_CD: Tensor, weight_VD: Tensor, bias_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits and ids of the `k` most probable of these tokens."""
    logits_CK = torch.baddbmm(bias_V[ids_CK][:, :, None], weight_VD[ids_CK], h_CD[:, :, None]).squeeze(2)
    best = logits_CK.topk(min(k, ids_CK.shape[1]), dim=1)
    return best.values, ids_CK.gather(1, best.indices)


def _mean(best_NK: Tensor, ids_NK: Tensor, embedding_VD: Tensor) -> Tensor:
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
