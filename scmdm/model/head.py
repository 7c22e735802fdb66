"""The output head on masked positions only, in chunks: a B x L x V tensor never exists.

Legend: N masked positions, D width, V vocabulary (with the mask), C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def subs_bias(bias_V: Tensor, mask_id: int) -> Tensor:
    """The bias with minus infinity at the mask: SUBS' zero masking probability (MDLM section 3.2.3)."""
    return bias_V.float().index_fill(0, torch.tensor([mask_id], device=bias_V.device), float("-inf"))


def subs_logits(h_CD: Tensor, weight_VD: Tensor, subs_bias_V: Tensor) -> Tensor:
    """Logits (C, V) in float32; the product runs in the dtype of `h_CD`."""
    return F.linear(h_CD, weight_VD.to(h_CD.dtype)).float() + subs_bias_V


class _WeightedNLL(torch.autograd.Function):
    """Forward makes the gradients chunk by chunk, so that neither logits nor probabilities are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        x_N: Tensor,
        w_N: Tensor,
        mask_id: int,
        chunk: int,
        need_gradient: bool,
        train_head: bool,
    ) -> tuple[Tensor, Tensor]:
        bias = subs_bias(bias_V, mask_id)
        nll_N = bias.new_empty(len(h_ND))
        d_h = torch.empty_like(h_ND) if need_gradient else None
        d_weight = torch.zeros_like(weight_VD, dtype=bias.dtype) if train_head else None
        d_bias = torch.zeros_like(bias) if train_head else None
        for start in range(0, len(h_ND), chunk):
            rows = slice(start, start + chunk)
            h_CD, x_C1 = h_ND[rows], x_N[rows, None]
            logits_CV = subs_logits(h_CD, weight_VD, bias)
            lse_C1 = logits_CV.logsumexp(1, keepdim=True)
            nll_N[rows] = (lse_C1 - logits_CV.gather(1, x_C1)).squeeze(1)
            if d_h is None:
                continue
            d_logits = (logits_CV - lse_C1).exp().mul_(w_N[rows, None])
            d_logits.scatter_add_(1, x_C1, -w_N[rows, None])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(h_CD.dtype)
            d_h[rows] = d_logits @ weight_VD.to(h_CD.dtype)
            if d_weight is not None:
                d_weight += (d_logits.T @ h_CD).float()
        if d_h is not None and d_weight is not None and d_bias is not None:
            ctx.save_for_backward(d_h, d_weight.to(weight_VD.dtype), d_bias.to(bias_V.dtype))
        elif d_h is not None:
            ctx.save_for_backward(d_h, None, None)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N.double() * w_N).sum().float(), nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, _d_nll: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if gradient is None else gradient * d_total for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None


def weighted_nll_sum(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, x_N: Tensor, w_N: Tensor, *, mask_id: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """`sum_n w_n * -log softmax(W h_n + b)[x_n]` (float32 scalar) and the unweighted values (N,) without gradient.

    `x_N` must not hold `mask_id`. Differentiable once, by `h_ND`, `weight_VD` and `bias_V`.
    """
    # Inside the function gradients are off, and `needs_input_grad` is true even under `no_grad`.
    train_head = torch.is_grad_enabled() and (weight_VD.requires_grad or bias_V.requires_grad)
    need = train_head or (torch.is_grad_enabled() and h_ND.requires_grad)
    with torch.autocast(h_ND.device.type, enabled=False):
        total, nll_N = _WeightedNLL.apply(h_ND, weight_VD, bias_V, x_N, w_N, mask_id, chunk, need, train_head)
    return total, nll_N


def expected_embedding(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    embedding_VD: Tensor,
    *,
    mask_id: int,
    chunk: int,
    top_k: int | None = None,
) -> Tensor:
    """`softmax(W h + b) @ E` (N, D) in the dtype of `embedding_VD`: the clean-state estimate as an embedding.

    `top_k` takes only so many most probable tokens, whose probabilities are renormalised: the estimate stays a mean of
    embeddings. Differentiable; logits are then made again in the backward pass, chunk by chunk.
    """
    if not len(h_ND):
        return embedding_VD.new_zeros(0, embedding_VD.shape[1])
    with torch.autocast(h_ND.device.type, enabled=False):
        bias, embedding = subs_bias(bias_V, mask_id), embedding_VD.to(h_ND.dtype)
        needed = (weight_VD, bias, embedding, top_k)
        if torch.is_grad_enabled():
            parts = [checkpoint(_mean_embedding, h_CD, *needed, use_reentrant=False) for h_CD in h_ND.split(chunk)]
        else:
            parts = [_mean_embedding(h_CD, *needed) for h_CD in h_ND.split(chunk)]
        return torch.cat(parts).to(embedding_VD.dtype)


def _mean_embedding(
    h_CD: Tensor, weight_VD: Tensor, subs_bias_V: Tensor, embedding_VD: Tensor, top_k: int | None
) -> Tensor:
    p_CV = _probabilities(subs_logits(h_CD, weight_VD, subs_bias_V), top_k)
    return p_CV.to(h_CD.dtype) @ embedding_VD


def _probabilities(logits_CV: Tensor, top_k: int | None) -> Tensor:
    if top_k is None:
        return logits_CV.softmax(1)
    best_CK, tokens_CK = logits_CV.topk(min(top_k, logits_CV.shape[1]), dim=1)
    return torch.zeros_like(logits_CV).scatter_(1, tokens_CK, best_CK.softmax(1))
