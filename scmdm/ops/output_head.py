"""The output head on masked positions only, in chunks: a B x L x V tensor never exists.

How a chunk is done depends on the device: `scmdm.ops.output_head_cpu` for a CPU, `scmdm.ops.output_head_gpu` for a GPU.

Legend: N masked positions, D width, V vocabulary (with the mask), C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from scmdm.ops import output_head_cpu, output_head_gpu
from scmdm.ops.subs_logits import subs_bias, subs_logits
from scmdm.ops.top_k import mean_of_best


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
        kernels = output_head_gpu if h_ND.device.type == "cuda" else output_head_cpu
        nll_N, d_h, d_weight, d_bias = kernels.nll_and_gradients(
            h_ND,
            weight_VD,
            subs_bias(bias_V, mask_id),
            x_N,
            w_N,
            chunk=chunk,
            need_gradient=need_gradient,
            train_head=train_head,
        )
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
        return *scaled, None, None, None, None, None, None, None


def weighted_nll_sum(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    x_N: Tensor,
    w_N: Tensor,
    *,
    mask_id: int,
    chunk: int,
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
    rank: int | None = None,
) -> Tensor:
    """`softmax(W h + b) @ E` (N, D) in the dtype of `embedding_VD`: the clean-state estimate as an embedding.

    `top_k` takes only so many most probable tokens, whose probabilities are renormalised: the estimate stays a mean of
    embeddings, and the second product with the vocabulary becomes a sum of `top_k` of its rows. `rank` seeks them along
    so many principal axes of the head, without gradients and where there are enough positions for that to be less work.
    Differentiable; logits are then made again in the backward pass, chunk by chunk.
    """
    with torch.autocast(h_ND.device.type, enabled=False):
        bias = subs_bias(bias_V, mask_id)
        if torch.is_grad_enabled():
            return _by_chunks(h_ND, weight_VD, bias, embedding_VD, chunk, top_k)
        kernels = output_head_gpu if h_ND.device.type == "cuda" else output_head_cpu
        if top_k is not None:
            return kernels.estimate_of_best(h_ND, weight_VD, bias, embedding_VD, top_k, rank, chunk=chunk)
        return kernels.estimate(h_ND, weight_VD, bias, embedding_VD, chunk=chunk)


def _by_chunks(
    h_ND: Tensor, weight_VD: Tensor, subs_bias_V: Tensor, embedding_VD: Tensor, chunk: int, top_k: int | None
) -> Tensor:
    parts = []
    for h_CD in h_ND.split(output_head_cpu.chunk_rows(chunk, len(subs_bias_V)) if h_ND.device.type == "cpu" else chunk):
        needed = (h_CD, weight_VD, subs_bias_V, embedding_VD, top_k)
        parts.append(checkpoint(_dense_estimate, *needed, use_reentrant=False))
    return torch.cat(parts)


def _dense_estimate(
    h_CD: Tensor, weight_VD: Tensor, subs_bias_V: Tensor, embedding_VD: Tensor, top_k: int | None
) -> Tensor:
    logits_CV = subs_logits(h_CD, weight_VD, subs_bias_V)
    if top_k is not None:
        return mean_of_best(logits_CV, embedding_VD, top_k)
    return (logits_CV.softmax(1).to(h_CD.dtype) @ embedding_VD.to(h_CD.dtype)).to(embedding_VD.dtype)
