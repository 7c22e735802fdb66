"""The output head on a CPU, tiled along positions and along the vocabulary.

A tile of logits is transformed in place while it is in the cache, and all chunks use one buffer, because new memory
costs a page fault for every 4 KiB. The softmax is accumulated over the tiles of the vocabulary as in FlashAttention
(arXiv 2205.14135).

Legend: N masked positions, D width, V vocabulary (with the mask), C positions of a chunk, T tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scmdm.ops.confidence import bounded, relative_entropy
from scmdm.ops.top_k import chunked_top_k_embedding

_TILE = 4096  # tokens
_CHUNK = 1 << 24  # logits of a chunk: 64 MiB in float32


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
    """Return the negative log-likelihoods (N,) and the gradients of their sum weighted by `w_N`.

    The gradients are with respect to hidden states, weight and bias; None where `need_gradient` (states) or
    `train_head` (weight and bias) is false.
    """
    nll_N = subs_bias_V.new_empty(len(h_ND))
    d_h = torch.empty_like(h_ND) if need_gradient else None
    d_weight = torch.zeros_like(weight_VD, dtype=subs_bias_V.dtype) if train_head else None
    d_bias = torch.zeros_like(subs_bias_V) if train_head else None
    buffer = _buffer(len(h_ND), len(subs_bias_V) if need_gradient else _TILE, chunk, subs_bias_V)
    for rows in _chunks(len(h_ND), len(subs_bias_V), chunk):
        own = _Gradients(d_h[rows], d_weight, d_bias) if d_h is not None else None
        nll_N[rows] = _chunk_nll(h_ND[rows], weight_VD, subs_bias_V, x_N[rows, None], w_N[rows, None], own, buffer)
    return nll_N, d_h, d_weight, d_bias


def estimate(
    h_ND: Tensor,
    weight_VD: Tensor,
    subs_bias_V: Tensor,
    embedding_VD: Tensor,
    confidence: str | None = None,
    *,
    chunk: int,
) -> Tensor:
    """Return `softmax(W h + b) @ E` (N, D) without gradients, in the dtype of `embedding_VD`.

    With `confidence` one more column is the confidence of that kind (`scmdm.ops.confidence`).
    """
    chunks = [_Estimate(h_ND[rows], subs_bias_V, confidence) for rows in _chunks(len(h_ND), len(subs_bias_V), chunk)]
    buffer = _buffer(len(h_ND), _TILE, chunk, subs_bias_V)
    for tile in _tiles(len(subs_bias_V)):
        weight_TD, embedding_TD = weight_VD[tile].to(h_ND.dtype), embedding_VD[tile].to(h_ND.dtype)
        for own in chunks:
            own.add(weight_TD, subs_bias_V[tile], embedding_TD, buffer)
    parts = [own.result() for own in chunks]
    if not parts:
        return embedding_VD.new_zeros(0, embedding_VD.shape[1] + (confidence is not None))
    return torch.cat(parts).to(embedding_VD.dtype)


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
    """Compute `estimate` over the `top_k` most probable tokens, with renormalised probabilities.

    Logits are rounded once, to the dtype of `h_ND`, after the bias is added.
    """
    weight_VD, bias_V = weight_VD.to(h_ND.dtype), subs_bias_V.to(h_ND.dtype)
    chunk = max(64, chunk_rows(chunk, len(bias_V)) // 4)  # a smaller buffer maps fewer new pages
    return chunked_top_k_embedding(h_ND, weight_VD, bias_V, embedding_VD, top_k, confidence, chunk=chunk)


def chunk_rows(chunk: int, vocab_size: int) -> int:
    """Return the positions of a chunk on a CPU: at most `chunk`, and 64 MiB of logits, or 64 rows if that is more."""
    return min(chunk, max(64, _CHUNK // vocab_size))


def _chunks(rows: int, vocab_size: int, chunk: int) -> list[slice]:
    chunk = chunk_rows(chunk, vocab_size)
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _tiles(vocab_size: int) -> list[slice]:
    return [slice(start, min(start + _TILE, vocab_size)) for start in range(0, vocab_size, _TILE)]


def _buffer(rows: int, columns: int, chunk: int, like: Tensor) -> Tensor:
    """Allocate memory for logits of one chunk."""
    return like.new_empty(min(rows, chunk_rows(chunk, len(like))) * min(columns, len(like)))


def _logits(h_CD: Tensor, weight_TD: Tensor, bias_T: Tensor, buffer: Tensor) -> Tensor:
    """Return `subs_logits` of a tile (C, T) in the first elements of `buffer`."""
    out_CT = buffer[: len(h_CD) * len(bias_T)].view(len(h_CD), len(bias_T))
    if h_CD.dtype == out_CT.dtype:
        return torch.addmm(bias_T, h_CD, weight_TD.T, out=out_CT)
    return out_CT.copy_(F.linear(h_CD, weight_TD)).add_(bias_T)


class _RunningSoftmax:
    """Softmax statistics of rows whose logits arrive in tiles: running maximum, and sum of `exp(logit - maximum)`.

    With `entropy`, also the sum of `-e log e` over these exponentials `e`.
    """

    def __init__(self, rows: int, like: Tensor, *, entropy: bool = False) -> None:
        # Finite, because a tile may hold only the mask, whose logit is minus infinity.
        self.top_C1 = like.new_full((rows, 1), torch.finfo(like.dtype).min)
        self.sum_C1 = torch.zeros_like(self.top_C1)
        self.entropy_sum_C1 = torch.zeros_like(self.top_C1) if entropy else None

    def add(self, tile_CT: Tensor) -> Tensor:
        """Replace a tile by `exp(logit - maximum)` and return the factor (C, 1) that rescales earlier tiles."""
        top_C1 = torch.maximum(self.top_C1, tile_CT.amax(1, keepdim=True))
        factor_C1 = (self.top_C1 - top_C1).exp_()
        tile_CT.sub_(top_C1).exp_()
        if self.entropy_sum_C1 is not None:
            rescaled_C1 = self.entropy_sum_C1 * factor_C1 + self.sum_C1 * torch.special.entr(factor_C1)
            self.entropy_sum_C1 = rescaled_C1 + torch.special.entr(tile_CT).sum(1, keepdim=True)
        self.top_C1, self.sum_C1 = top_C1, self.sum_C1 * factor_C1 + tile_CT.sum(1, keepdim=True)
        return factor_C1

    def entropy_C1(self) -> Tensor:
        """Return the entropy (C, 1) of the rows."""
        assert self.entropy_sum_C1 is not None
        return self.sum_C1.log() + self.entropy_sum_C1 / self.sum_C1


class _Estimate:
    """Expected embedding of a chunk, accumulated over tiles of the vocabulary."""

    def __init__(self, h_CD: Tensor, like: Tensor, confidence: str | None) -> None:
        self.h_CD, self.confidence, self.tokens = h_CD, confidence, len(like) - 1
        self.softmax = _RunningSoftmax(len(h_CD), like, entropy=confidence == "entropy")
        self.sum_CD = torch.zeros_like(h_CD, dtype=like.dtype)

    def add(self, weight_TD: Tensor, bias_T: Tensor, embedding_TD: Tensor, buffer: Tensor) -> None:
        tile_CT = _logits(self.h_CD, weight_TD, bias_T, buffer)
        self.sum_CD *= self.softmax.add(tile_CT)
        _add_product(self.sum_CD, tile_CT.to(self.h_CD.dtype), embedding_TD)

    def result(self) -> Tensor:
        mean_CD = self.sum_CD / self.softmax.sum_C1
        if self.confidence is None:
            return mean_CD
        if self.confidence == "top1":
            found_C1 = 1 / self.softmax.sum_C1
        else:
            found_C1 = relative_entropy(self.softmax.entropy_C1(), self.tokens)
        return torch.cat([mean_CD, bounded(found_C1)], 1)


@dataclass(frozen=True)
class _Gradients:
    """Buffers for gradients: chunks write their rows of `h_ND`, and add to the other two (None for a frozen head)."""

    h_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None


def _chunk_nll(
    h_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    x_C1: Tensor,
    w_C1: Tensor,
    gradients: _Gradients | None,
    buffer: Tensor,
) -> Tensor:
    """Return the negative log-likelihoods (C,) of a chunk; add their gradients, weighted by `w_C1`, to `gradients`."""
    softmax, own_C1 = _RunningSoftmax(len(h_CD), bias_V), torch.zeros_like(x_C1, dtype=bias_V.dtype)
    kept = []
    for tile in _tiles(len(bias_V)):
        # All tiles are kept for the gradients, one after the other.
        free = buffer if gradients is None else buffer[len(h_CD) * tile.start :]
        logits_CT = _logits(h_CD, weight_VD[tile].to(h_CD.dtype), bias_V[tile], free)
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
    """Return the mask (C, 1) of ids within a tile, and their columns (C, 1), clamped where they are outside."""
    at_C1 = x_C1 - tile.start
    return (x_C1 >= tile.start) & (x_C1 < tile.stop), at_C1.clamp(0, tile.stop - tile.start - 1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `total` (float32)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += (a @ b).float()
