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

    def __init__(self, like_CD: Tensor) -> None:
        lowest = torch.finfo(torch.float32).min  # not minus infinity: a tile may hold the mask alone
        self.top_C1 = torch.full((len(like_CD), 1), lowest, device=like_CD.device)
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
    """Float32 sums that the chunks add to; `h_ND` they fill."""

    h_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor


def _chunk_nll(
    h_CD: Tensor, weight_VD: Tensor, bias_V: Tensor, x_C1: Tensor, w_C1: Tensor, gradients: _Gradients | None
) -> Tensor:
    """Negative log-likelihoods (C,) of a chunk, whose gradients, weighted by `w_C1`, are added to `gradients`."""
    softmax, own_C1 = _RunningSoftmax(h_CD), torch.zeros_like(x_C1, dtype=torch.float32)
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
    scale_C1, d_h_CD = w_C1 / softmax.sum_C1, torch.zeros_like(h_CD, dtype=torch.float32)
    for tile, d_logits_CT, top_C1 in kept:
        inside_C1, at_C1 = _within(tile, x_C1)
        d_logits_CT.mul_((top_C1 - softmax.top_C1).exp_() * scale_C1)
        d_logits_CT.scatter_add_(1, at_C1, torch.where(inside_C1, -w_C1, 0))
        gradients.bias_V[tile] += d_logits_CT.sum(0)
        cast_CT = d_logits_CT.to(h_CD.dtype)
        _add_product(d_h_CD, cast_CT, weight_VD[tile].to(h_CD.dtype))
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
    ) -> tuple[Tensor, Tensor]:
        bias = subs_bias(bias_V, mask_id)
        nll_N = torch.empty(len(h_ND), dtype=torch.float32, device=h_ND.device)
        sums = None
        if need_gradient:
            d_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            sums = _Gradients(torch.empty_like(h_ND), d_weight, torch.zeros_like(bias))
        for rows in _chunks(len(h_ND), len(bias), chunk, h_ND.device):
            own = _Gradients(sums.h_ND[rows], sums.weight_VD, sums.bias_V) if sums is not None else None
            nll_N[rows] = _chunk_nll(h_ND[rows], weight_VD, bias, x_N[rows, None], w_N[rows, None], own)
        if sums is not None:
            ctx.save_for_backward(sums.h_ND, sums.weight_VD.to(weight_VD.dtype), sums.bias_V.to(bias_V.dtype))
        ctx.mark_non_differentiable(nll_N)
        return (nll_N.double() * w_N).sum().float(), nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, _d_nll: Tensor) -> tuple[Tensor | None, ...]:
        d_h, d_weight, d_bias = ctx.saved_tensors
        # In place: nobody else has them, and autograd refuses a second backward pass after it.
        return d_h.mul_(d_total), d_weight.mul_(d_total), d_bias.mul_(d_total), None, None, None, None, None


def weighted_nll_sum(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, x_N: Tensor, w_N: Tensor, *, mask_id: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """`sum_n w_n * -log softmax(W h_n + b)[x_n]` (float32 scalar) and the unweighted values (N,) without gradient.

    `x_N` must not hold `mask_id`. Differentiable once, by `h_ND`, `weight_VD` and `bias_V`.
    """
    # Inside the function gradients are off, and `needs_input_grad` is true even under `no_grad`.
    need_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (h_ND, weight_VD, bias_V))
    with torch.autocast(h_ND.device.type, enabled=False):
        total, nll_N = _WeightedNLL.apply(h_ND, weight_VD, bias_V, x_N, w_N, mask_id, chunk, need_gradient)
    return total, nll_N


@torch.no_grad()
def expected_embedding(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, embedding_VD: Tensor, *, mask_id: int, chunk: int
) -> Tensor:
    """`softmax(W h + b) @ E` (N, D) in the dtype of `embedding_VD`, without gradient: the clean-state estimate."""
    with torch.autocast(h_ND.device.type, enabled=False):
        bias = subs_bias(bias_V, mask_id)
        estimate_ND = embedding_VD.new_empty(len(h_ND), embedding_VD.shape[1])
        for rows in _chunks(len(h_ND), len(bias), chunk, h_ND.device):
            estimate_ND[rows] = _chunk_estimate(h_ND[rows], weight_VD, bias, embedding_VD)
        return estimate_ND


def _chunk_estimate(h_CD: Tensor, weight_VD: Tensor, bias_V: Tensor, embedding_VD: Tensor) -> Tensor:
    softmax, sum_CD = _RunningSoftmax(h_CD), torch.zeros_like(h_CD, dtype=torch.float32)
    for tile in _tiles(len(bias_V), h_CD.device):
        tile_CT = subs_logits(h_CD, weight_VD[tile], bias_V[tile])
        sum_CD *= softmax.add(tile_CT)
        _add_product(sum_CD, tile_CT.to(h_CD.dtype), embedding_VD[tile].to(h_CD.dtype))
    return sum_CD / softmax.sum_C1
