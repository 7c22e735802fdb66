"""Keyed random numbers: a draw depends on its key alone, not on process, device or order of the calls.

Philox4x32-10 (Salmon et al., SC 2011) in torch integer arithmetic: the same bits on CPU and GPU, and on 1 or 512 ranks.

Legend: B samples, N draws per sample.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from scmdm.diffusion.fused import fused

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int] | tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return four 32-bit words (in int64 tensors) for each counter of 4 x 32 bits.

    The key has 64 bits, as two ints or 0-d tensors. Products in int64 wrap modulo 2^64, which keeps the bits of the
    unsigned product; the mask undoes the sign extension of the shift.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@fused
def _words(ids_B: Tensor, block_K: Tensor, step_and_key_3: Tensor) -> tuple[Tensor, ...]:
    step, key_0, key_1 = step_and_key_3.unbind()
    low, high = (ids_B & _MASK)[:, None], ((ids_B >> 32) & _MASK)[:, None]
    counter = torch.broadcast_tensors(block_K[None, :], step, low, high)
    return philox_4x32((counter[0], counter[1], counter[2], counter[3]), (key_0, key_1))


@fused
def _uniform(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    pairs = torch.stack([(w0 << 21) | (w1 >> 11), (w2 << 21) | (w3 >> 11)], dim=-1).flatten(1)
    # 53 bits plus the half step that excludes 0 and 1 would need a mantissa of 54 bits: drop the lowest bit.
    return ((pairs >> 1).double() + 0.5) * 2.0**-52


def keyed_words(seed: int, purpose: str, step: int, ids_B: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """Return four tensors (B, blocks) of 32-bit words for non-negative sample ids (B,), int64, at `step`."""
    assert ids_B.dtype == torch.int64
    assert ids_B.ndim == 1
    # A tensor, because a compiled kernel would contain numbers as constants.
    step_and_key_3 = torch.tensor([step & _MASK, *_key(seed, purpose)], device=ids_B.device)
    return _words(ids_B, torch.arange(blocks, device=ids_B.device), step_and_key_3)


def keyed_uniform(seed: int, purpose: str, step: int, ids_B: Tensor, n: int) -> Tensor:
    """Return uniforms (B, n), float64 with 52 random bits, strictly within (0, 1)."""
    return _uniform(*keyed_words(seed, purpose, step, ids_B, (n + 1) // 2))[:, :n]


def keyed_normal(seed: int, purpose: str, step: int, ids_B: Tensor, n: int) -> Tensor:
    """Return standard normal draws (B, n), float32; the first of a sample do not depend on `n`."""
    draws_Bn = torch.empty(len(ids_B), n, device=ids_B.device)
    for row, draws_n in zip(ids_B.split(1), draws_Bn, strict=True):  # a draw takes some 100 bytes
        radius, angle = keyed_uniform(seed, purpose, step, row, n + n % 2)[0].unflatten(0, (-1, 2)).unbind(1)
        radius, angle = (-2 * radius.log()).sqrt(), 2 * torch.pi * angle  # Box and Muller
        draws_n.copy_(torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten()[:n])
    return draws_Bn


def keyed_permutation(seed: int, purpose: str, step: int, ids_N: Tensor) -> Tensor:
    """Return the rank (N,) of each id in a random order that depends on the set of ids, not on their order.

    Equal ids (a sample drawn twice into one batch) are ranked by position.
    """
    w0, w1, _, _ = keyed_words(seed, purpose, step, ids_N, 1)
    keys = (w0[:, 0] << 31) | (w1[:, 0] >> 1)
    by_id = torch.argsort(ids_N, stable=True)
    order = by_id[torch.argsort(keys[by_id], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank


def keyed_int(seed: int, purpose: str, step: int) -> int:
    """Return a 63-bit integer, to seed the generator of a library for a step (dropout)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
