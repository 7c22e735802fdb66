"""The output head on masked positions only, in chunks: a B x L x V tensor never exists.

On a CPU a chunk is cut along the vocabulary, too: what is made of a tile's logits is made in their place while they are
in the cache. Softmax runs along the tiles as in FlashAttention (arXiv 2205.14135).

Legend: N masked positions, D width, V vocabulary (with the mask), C rows of a chunk, T columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_CPU_TILE = 4096
_CPU_CHUNK = 1 << 24  # logits of a chunk, 64 MiB


def subs_bias(bias_V: Tensor, mask_id: int) -> Tensor:
    """The bias with minus infinity at the mask: SUBS' zero masking probability (MDLM section 3.2.3)."""
    return bias_V.float().index_fill(0, torch.tensor([mask_id], device=bias_V.device), float("-inf"))


def subs_logits(h_CD: Tensor, weight_VD: Tensor, subs_bias_V: Tensor) -> Tensor:
    """Logits (C, V) in float32; the product runs in the dtype of `h_CD`."""
    return F.linear(h_CD, weight_VD.to(h_CD.dtype)).float().add_(subs_bias_V)


def _chunks(rows: int, vocab_size: int, chunk: int, device: torch.device) -> list[slice]:
    if device.type == "cpu":
        chunk = min(chunk, max(64, _CPU_CHUNK // vocab_size))
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _tiles(vocab_size: int, device: torch.device) -> list[slice]:
    width = _CPU_TILE if device.type == "cpu" else vocab_size
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


class _RunningSoftmax:
    """Of rows of logits that come tile by tile: the largest so far, and the sum of `exp(logit - largest)`."""

    def __init__(self, rows: int, like: Tensor) -> None:
        # Not minus infinity: a tile may hold the mask alone.
        self.top_C1 = like.new_full((rows, 1), torch.finfo(like.dtype).min)
        self.sum_C1 = torch.zeros_like(self.top_C1)

    def add(self, tile_CT: Tensor) -> Tensor:
        """Turn logits into `exp(logit - largest)` in place; returns the factor (C, 1) for what earlier tiles gave."""
        top_C1 = torch.maximum(self.top_C1, tile_CT.amax(1, keepdim=True))
        factor_C1 = (self.top_C1 - top_C1).exp_()
        tile_CT.sub_(top_C1).exp_()
        self.top_C1, self.sum_C1 = top_C1, self.sum_C1 * factor_C1 + tile_CT.sum(1, keepdim=True)
        return factor_C1


@dataclass(frozen=True)
class _Gradients:
    """Float32 sums that the chunks add to; `h_ND` they fill. A frozen head has none."""

    h_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None


def _chunk_nll(
    h_CD: Tensor, weight_VD: Tensor, bias_V: Tensor, x_C1: Tensor, w_C1: Tensor, gradients: _Gradients | None
) -> Tensor:
    """Negative log-likelihoods (C,) of a chunk, whose gradients, weighted by `w_C1`, are added to `gradients`."""
    softmax, own_C1 = _RunningSoftmax(len(h_CD), bias_V), torch.zeros_like(x_C1, dtype=bias_V.dtype)
    kept = []
    for tile in _tiles(len(bias_V), h_CD.device):
        logits_CT = subs_logits(h_CD, weight_VD[tile], bias_V[tile])
        inside_C1, at_C1 = _within(tile, x_C1)
        own_C1 = torch.where(inside_C1, logits_CT.gather(1, at_C1), own_C1)
        softmax.add(logits_CT)
        if gradients is not None:
            kept.append((tile, logits_CT, softmax.top_C1))
    nll_C = (softmax.sum_C1.log() + softmax.top_C1 - own_C1).squeeze(1)
    if gradients is None:
        return nll_C
    scale_C1, d_h_CD = w_C1 / softmax.sum_C1, torch.zeros_like(h_CD, dtype=bias_V.dtype)
    for tile, d_logits_CT, top_C1 in kept:
        inside_C1, at_C1 = _within(tile, x_C1)
        d_logits_CT.mul_((top_C1 - softmax.top_C1).exp_() * scale_C1)
        d_logits_CT.scatter_add_(1, at_C1, torch.where(inside_C1, -w_C1, 0))
        cast_CT = d_logits_CT.to(h_CD.dtype)
        _add_product(d_h_CD, cast_CT, weight_VD[tile].to(h_CD.dtype))
        if gradients.weight_VD is not None and gradients.bias_V is not None:
            gradients.bias_V[tile] += d_logits_CT.sum(0)
            _add_product(gradients.weight_VD[tile], cast_CT.T, h_CD)
    gradients.h_ND.copy_(d_h_CD)
    return nll_C


def _within(tile: slice, x_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows' ids a tile holds, and their columns in it (any, where it does not)."""
    at_C1 = x_C1 - tile.start
    return (x_C1 >= tile.start) & (x_C1 < tile.stop), at_C1.clamp(0, tile.stop - tile.start - 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += (a @ b).float()


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
        for rows in _chunks(len(h_ND), len(bias), chunk, h_ND.device):
            own = _Gradients(d_h[rows], d_weight, d_bias) if d_h is not None else None
            nll_N[rows] = _chunk_nll(h_ND[rows], weight_VD, bias, x_N[rows, None], w_N[rows, None], own)
        if d_weight is not None and d_bias is not None:
            d_weight, d_bias = d_weight.to(weight_VD.dtype), d_bias.to(bias_V.dtype)
        ctx.save_for_backward(d_h, d_weight, d_bias)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N.double() * w_N).sum().float(), nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, _d_nll: Tensor) -> tuple[Tensor | None, ...]:
        # In place: nobody else has them, and autograd refuses a second backward pass after it.
        scaled = [None if gradient is None else gradient.mul_(d_total) for gradient in ctx.saved_tensors]
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
    with torch.autocast(h_ND.device.type, enabled=False):
        bias = subs_bias(bias_V, mask_id)
        parts = []
        for rows in _chunks(len(h_ND), len(bias), chunk, h_ND.device):
            needed = (h_ND[rows], weight_VD, bias, embedding_VD)
            if torch.is_grad_enabled():
                parts.append(checkpoint(_dense_estimate, *needed, top_k, use_reentrant=False))
            elif top_k is not None:
                parts.append(_dense_estimate(*needed, top_k))
            else:
                parts.append(_tiled_estimate(*needed))
        return torch.cat(parts) if parts else embedding_VD.new_zeros(0, embedding_VD.shape[1])


def _dense_estimate(
    h_CD: Tensor, weight_VD: Tensor, subs_bias_V: Tensor, embedding_VD: Tensor, top_k: int | None
) -> Tensor:
    p_CV = _probabilities(subs_logits(h_CD, weight_VD, subs_bias_V), top_k)
    return (p_CV.to(h_CD.dtype) @ embedding_VD.to(h_CD.dtype)).to(embedding_VD.dtype)


def _probabilities(logits_CV: Tensor, top_k: int | None) -> Tensor:
    if top_k is None:
        return logits_CV.softmax(1)
    best_CK, tokens_CK = logits_CV.topk(min(top_k, logits_CV.shape[1]), dim=1)
    return torch.zeros_like(logits_CV).scatter_(1, tokens_CK, best_CK.softmax(1))


def _tiled_estimate(h_CD: Tensor, weight_VD: Tensor, subs_bias_V: Tensor, embedding_VD: Tensor) -> Tensor:
    """The same without gradients, all tokens."""
    softmax = _RunningSoftmax(len(h_CD), subs_bias_V)
    sum_CD = torch.zeros_like(h_CD, dtype=subs_bias_V.dtype)
    for tile in _tiles(len(subs_bias_V), h_CD.device):
        tile_CT = subs_logits(h_CD, weight_VD[tile], subs_bias_V[tile])
        sum_CD *= softmax.add(tile_CT)
        _add_product(sum_CD, tile_CT.to(h_CD.dtype), embedding_VD[tile].to(h_CD.dtype))
    return (sum_CD / softmax.sum_C1).to(embedding_VD.dtype)
