"""The output head on a GPU: matrix products over whole chunks, and one fused kernel between them.

Logits stay in the dtype of the products, and their gradient overwrites them; sums are in float32. The vocabulary is
padded to a multiple of 64: cuBLAS has fast kernels only where a row is a multiple of 16 bytes.

Legend: N masked positions, V vocabulary (with the mask), P padded vocabulary, D width, C positions of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scmdm.diffusion.fused import fused
from scmdm.ops.confidence import confidence_of
from scmdm.ops.top_k import chunked_top_k_embedding

_MULTIPLE = 64


def nll_and_gradients(
    h_ND: Tensor,
    weight_VD: Tensor,
    subs_bias_V: Tensor,
    x_N: Tensor,
    w_N: Tensor,
    *,
    chunk: int,
    need_gradient: bool,
    train_head: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """See `scmdm.ops.output_head_cpu.nll_and_gradients`."""
    vocab_size = len(weight_VD)
    weight_PD, bias_P = _widen(weight_VD, h_ND.dtype), _pad_bias(subs_bias_V)
    nll_N = subs_bias_V.new_empty(len(h_ND))
    d_h = torch.empty_like(h_ND) if need_gradient else None
    d_weight = torch.zeros_like(weight_PD, dtype=bias_P.dtype) if train_head else None
    d_bias = torch.zeros_like(bias_P) if train_head else None
    for rows in _chunks(len(h_ND), chunk):
        h_CD, x_C = h_ND[rows], x_N[rows]
        logits_CP = h_CD @ weight_PD.T
        nll_N[rows], log_sum_C = _nll(logits_CP, bias_P, x_C)
        if d_h is None:
            continue
        d_logits_CP = _to_gradient(logits_CP, bias_P, log_sum_C, x_C, w_N[rows])
        torch.mm(d_logits_CP, weight_PD, out=d_h[rows])
        if d_weight is not None and d_bias is not None:
            d_weight += _product_float32(d_logits_CP.T, h_CD)
            d_bias += d_logits_CP.sum(0, dtype=d_bias.dtype)
    if d_weight is None or d_bias is None:
        return nll_N, d_h, None, None
    return nll_N, d_h, d_weight[:vocab_size], d_bias[:vocab_size]


def estimate(
    h_ND: Tensor,
    weight_VD: Tensor,
    subs_bias_V: Tensor,
    embedding_VD: Tensor,
    confidence: str | None = None,
    *,
    chunk: int,
) -> Tensor:
    """See `scmdm.ops.output_head_cpu.estimate`."""
    weight_PD, bias_P = _widen(weight_VD, h_ND.dtype), _pad_bias(subs_bias_V)
    embedding_PD = weight_PD if embedding_VD is weight_VD else _widen(embedding_VD, h_ND.dtype)
    estimate_ND = torch.empty_like(h_ND)
    found_N1 = bias_P.new_empty(len(h_ND), 1) if confidence is not None else None
    for rows in _chunks(len(h_ND), chunk):
        logits_CP = h_ND[rows] @ weight_PD.T
        if found_N1 is not None and confidence is not None:
            found_N1[rows] = _confidence(logits_CP, bias_P, confidence, len(embedding_VD) - 1)
        torch.mm(_to_probabilities(logits_CP, bias_P), embedding_PD, out=estimate_ND[rows])
    estimate_ND = estimate_ND.to(embedding_VD.dtype)
    return estimate_ND if found_N1 is None else torch.cat([estimate_ND, found_N1.to(estimate_ND.dtype)], 1)


def top_k_estimate(
    h_ND: Tensor,
    weight_VD: Tensor,
    subs_bias_V: Tensor,
    embedding_VD: Tensor,
    top_k: int,
    confidence: str | None = None,
    *,
    chunk: int,
) -> Tensor:
    """See `scmdm.ops.output_head_cpu.top_k_estimate`."""
    weight_PD, bias_P = _widen(weight_VD, h_ND.dtype), _pad_bias(subs_bias_V).to(h_ND.dtype)
    return chunked_top_k_embedding(h_ND, weight_PD, bias_P, embedding_VD, top_k, confidence, chunk=chunk)


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _widen(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight and pad it with rows of zeros, (P, D); it may be the weight itself."""
    rows, width = weight_VD.shape
    if weight_VD.dtype == dtype and rows % _MULTIPLE == 0:
        return weight_VD
    weight_PD = weight_VD.new_zeros((rows + -rows % _MULTIPLE, width), dtype=dtype)
    weight_PD[:rows] = weight_VD
    return weight_PD


def _pad_bias(subs_bias_V: Tensor) -> Tensor:
    """Pad a bias with minus infinity, (P,): padding has probability 0."""
    return F.pad(subs_bias_V, (0, -len(subs_bias_V) % _MULTIPLE), value=float("-inf"))


def _product_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` in float32, the dtype in which a GPU accumulates it."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else (a @ b).float()


@fused
def _nll(logits_CP: Tensor, bias_P: Tensor, x_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihoods (C,) and the softmax's log-normalisers (C,), in float32."""
    own_C = logits_CP.gather(1, x_C[:, None]).squeeze(1).float() + bias_P[x_C]
    log_sum_C = torch.logsumexp(logits_CP + bias_P, 1)
    return log_sum_C - own_C, log_sum_C


@fused
def _to_gradient(logits_CP: Tensor, bias_P: Tensor, log_sum_C: Tensor, x_C: Tensor, w_C: Tensor) -> Tensor:
    """Overwrite logits with the gradient of `sum_c w_c nll_c` with respect to them."""
    p_CP = (logits_CP + bias_P).sub_(log_sum_C[:, None]).exp_()
    own_CP = torch.arange(len(bias_P), device=x_C.device) == x_C[:, None]
    return logits_CP.copy_(p_CP.sub_(own_CP.float()).mul_(w_C[:, None]))


@fused
def _confidence(logits_CP: Tensor, bias_P: Tensor, kind: str, tokens: int) -> Tensor:
    """Return the confidence (C, 1) of predictions, in float32."""
    return confidence_of(logits_CP + bias_P, kind, tokens)


@fused
def _to_probabilities(logits_CP: Tensor, bias_P: Tensor) -> Tensor:
    """Return the softmax (C, P) of logits, in their dtype."""
    return (logits_CP + bias_P).softmax(1).to(logits_CP.dtype)
