"""The output head at masked positions: loss and expected embedding, without a (B, L, V) tensor.

`dense_weighted_nll_sum` and `dense_expected_embedding` define the results in plain PyTorch. `weighted_nll_sum` and
`expected_embedding` compute the same in chunks: `scmdm.ops.output_head_gpu` for CUDA tensors,
`scmdm.ops.output_head_cpu` otherwise.

Legend: N masked positions, D width, V vocabulary (with the mask), C positions of a chunk.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from scmdm.ops import output_head_cpu, output_head_gpu
from scmdm.ops.confidence import confidence_of
from scmdm.ops.subs_logits import subs_bias, subs_logits
from scmdm.ops.top_k import top_k_embedding


def dense_weighted_nll_sum(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, x_N: Tensor, w_N: Tensor, *, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Compute the reference of `weighted_nll_sum`: all logits (N, V) at once, gradients by autograd."""
    nll_N = F.cross_entropy(subs_logits(h_ND, weight_VD, subs_bias(bias_V, mask_id)), x_N, reduction="none")
    return (nll_N.double() * w_N).sum().float(), nll_N.detach()


def dense_expected_embedding(
    h_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    embedding_VD: Tensor,
    *,
    mask_id: int,
    top_k: int | None = None,
    temperature: float = 1.0,
    confidence: str | None = None,
) -> Tensor:
    """Compute the reference of `expected_embedding`: all logits (N, V) at once, gradients by autograd."""
    h_ND, bias = _tempered(h_ND, subs_bias(bias_V, mask_id), temperature)
    return _dense_estimate(h_ND, weight_VD, bias, embedding_VD, top_k, confidence)


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
    """Return `sum_n w_n * -log softmax(W h_n + b)[x_n]` (float32 scalar) and the unweighted terms (N,), detached.

    The mask's logit is minus infinity, so `x_N` must not contain `mask_id`. Differentiable once, with respect to
    `h_ND`, `weight_VD` and `bias_V`; the gradients are computed in the forward pass, at most `chunk` positions at a
    time.
    """
    # Determined here: inside an autograd function gradients are off, and `needs_input_grad` ignores `no_grad`.
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
    temperature: float = 1.0,
    confidence: str | None = None,
) -> Tensor:
    """Return the clean-state estimate `softmax((W h + b) / temperature) @ E` (N, D) in the dtype of `embedding_VD`.

    With `top_k` only the `top_k` most probable tokens count, with renormalised probabilities; a sum of `top_k` rows
    then replaces the second product with the vocabulary. With `confidence`, one more column is the confidence of that
    kind (`scmdm.ops.confidence`), over all tokens. Differentiable: the backward pass computes the logits again, at most
    `chunk` positions at a time.
    """
    with torch.autocast(h_ND.device.type, enabled=False):
        h_ND, bias = _tempered(h_ND, subs_bias(bias_V, mask_id), temperature)
        if torch.is_grad_enabled():
            return _checkpointed_estimate(h_ND, weight_VD, bias, embedding_VD, chunk, top_k, confidence)
        kernels = _kernels(h_ND.device)
        if top_k is not None:
            return kernels.top_k_estimate(h_ND, weight_VD, bias, embedding_VD, top_k, confidence, chunk=chunk)
        return kernels.estimate(h_ND, weight_VD, bias, embedding_VD, confidence, chunk=chunk)


def _tempered(h_ND: Tensor, subs_bias_V: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return states and bias whose logits are divided by the temperature."""
    return (h_ND, subs_bias_V) if temperature == 1 else (h_ND / temperature, subs_bias_V / temperature)


def _kernels(device: torch.device) -> ModuleType:
    """Return the module that implements `nll_and_gradients`, `estimate` and `top_k_estimate` for a device."""
    return output_head_gpu if device.type == "cuda" else output_head_cpu


class _WeightedNLL(torch.autograd.Function):
    """Loss that computes its gradients in the forward pass, chunk by chunk, so that no logits are kept."""

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
        nll_N, d_h, d_weight, d_bias = _kernels(h_ND.device).nll_and_gradients(
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
        # In place is safe: the graph holds the only references, and autograd refuses a second backward pass.
        scaled = [None if gradient is None else gradient.mul_(d_total) for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None


def _checkpointed_estimate(
    h_ND: Tensor,
    weight_VD: Tensor,
    subs_bias_V: Tensor,
    embedding_VD: Tensor,
    chunk: int,
    top_k: int | None,
    confidence: str | None,
) -> Tensor:
    if h_ND.device.type == "cpu":
        chunk = output_head_cpu.chunk_rows(chunk, len(subs_bias_V))
    parts = [
        checkpoint(_dense_estimate, h_CD, weight_VD, subs_bias_V, embedding_VD, top_k, confidence, use_reentrant=False)
        for h_CD in h_ND.split(chunk)
    ]
    return torch.cat(parts)


def _dense_estimate(
    h_CD: Tensor,
    weight_VD: Tensor,
    subs_bias_V: Tensor,
    embedding_VD: Tensor,
    top_k: int | None,
    confidence: str | None,
) -> Tensor:
    logits_CV = subs_logits(h_CD, weight_VD, subs_bias_V)
    if top_k is not None:
        mean_CD = top_k_embedding(logits_CV, embedding_VD, top_k)
    else:
        mean_CD = (logits_CV.softmax(1).to(h_CD.dtype) @ embedding_VD.to(h_CD.dtype)).to(embedding_VD.dtype)
    if confidence is None:
        return mean_CD
    return torch.cat([mean_CD, confidence_of(logits_CV, confidence, len(embedding_VD) - 1).to(mean_CD.dtype)], 1)
