"""Block diffusion (BD3-LM, arXiv 2503.09573): blocks from left to right, each by masked diffusion.

A model of blocks predicts the tokens of a block from its noised tokens and from the clean tokens of earlier blocks. The
likelihood bound is the sum of the NELBOs of all blocks. Training evaluates the blocks of a sequence together, on
`[z | x]`: a noised copy, in which each block sees itself and the earlier blocks of the clean copy, and that clean copy,
in which each block sees itself and earlier ones. Both copies have the same positions. A sampler evaluates a single
copy, in which each block sees itself and earlier ones: finished blocks are clean there.

Blocks are counted from the beginning of each document. The estimate of self-conditioning is null outside of the block
that is predicted, so that keys and values of finished blocks do not change, and a cache of them is exact.

Legend: B batch, R rows (B, or 1 if all sequences share them), L length, Q queries, K keys, N blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.packing import Packing


@dataclass(frozen=True)
class Places:
    """What decides which positions attend to each other; tensors broadcast against each other."""

    block: Tensor  # int64: number of the block within its document
    noised: Tensor  # bool: of the noised copy
    document: Tensor | None = None  # int64; None: one document per row

    def apply(self, function: Callable[[Tensor], Tensor]) -> Places:
        """Return the places whose tensors are the results of a function."""
        document = None if self.document is None else function(self.document)
        return Places(function(self.block), function(self.noised), document)

    def __getitem__(self, index: Any) -> Places:
        """Index all tensors, as in `places[..., None]`."""
        return self.apply(lambda values: values[index])


def may_attend(query: Places, key: Places) -> Tensor:
    """Return whether queries attend to keys, for places that broadcast against each other."""
    same_copy = (query.block == key.block) & (query.noised == key.noised)
    allowed = same_copy | ((key.block < query.block) & ~key.noised)
    if query.document is None or key.document is None:
        return allowed
    return allowed & (query.document == key.document)


def dense_mask(query_RQ: Places, key_RK: Places) -> Tensor:
    """Return the attention mask (R, 1, Q, K), bool, of a model of blocks."""
    return may_attend(query_RQ[..., :, None], key_RK[..., None, :])[:, None]


def places_of(length: int, block_length: int, packing: Packing | None, device: torch.device) -> Places:
    """Return the places (R, L) of single copies of sequences."""
    if packing is None:
        block_RL = (torch.arange(length, device=device) // block_length)[None]
        return Places(block_RL, torch.zeros_like(block_RL, dtype=torch.bool))
    block_RL = packing.positions_BL // block_length
    return Places(block_RL, torch.zeros_like(block_RL, dtype=torch.bool), packing.documents_BL)


def both_copies(clean_RL: Places) -> Places:
    """Return the places (R, 2 L) of `[z | x]`."""
    noised_RL = replace(clean_RL, noised=torch.ones_like(clean_RL.noised))
    document = None if clean_RL.document is None else torch.cat([clean_RL.document] * 2, dim=-1)
    pairs = ((noised_RL.block, clean_RL.block), (noised_RL.noised, clean_RL.noised))
    block, noised = (torch.cat(pair, dim=-1) for pair in pairs)
    return Places(block, noised, document)


def spread_times(
    t_B: Tensor,
    ids_B: Tensor,
    maskable_BL: Tensor,
    block_length: int,
    packing: Packing | None,
    *,
    t_min: float,
    seed: int,
    step: int,
) -> Tensor:
    """Return the time of each position's block (B, L), float64, from stratified times of the sequences.

    [t_min, 1] is divided into n equal intervals, one for each of a sequence's n blocks with maskable tokens, in a
    random order that is keyed on the sample and the block. A block's time lies in its interval at the place that the
    sequence's own time has in [t_min, 1]. The times of all blocks of all sequences are therefore stratified, too, and
    each of them is uniform. A sequence of one block has its own time.
    """
    number_BL = _numbers_in_row(maskable_BL, block_length, packing)
    size = int(number_BL.max()) + 1
    counted_BN = maskable_BL.new_zeros(len(ids_B), size, dtype=torch.int64).scatter_add_(
        1, number_BL, maskable_BL.long()
    )
    u_BN = keyed_uniform(seed, "block-time", step, ids_B, size).masked_fill(counted_BN == 0, torch.inf)
    rank_BN = u_BN.argsort(dim=1, stable=True).argsort(dim=1)
    count_B1 = (counted_BN > 0).sum(1, keepdim=True)
    within_B1 = ((t_B - t_min) / (1 - t_min))[:, None]
    t_BN = (t_min + (1 - t_min) * (within_B1 + rank_BN) / count_B1.clamp(min=1)).clamp(max=1)
    t_BN = torch.where(count_B1 == 1, t_B[:, None], t_BN)
    return t_BN.gather(1, number_BL)


def spread_uniforms(
    purpose: str, ids_B: Tensor, block_length: int, packing: Packing | None, length: int, *, seed: int, step: int
) -> Tensor:
    """Return a uniform for each position's block (B, L), float64."""
    number_BL = _numbers_in_row(ids_B.new_zeros(len(ids_B), length), block_length, packing)
    return keyed_uniform(seed, purpose, step, ids_B, int(number_BL.max()) + 1).gather(1, number_BL)


def _numbers_in_row(like_BL: Tensor, block_length: int, packing: Packing | None) -> Tensor:
    """Number the blocks of each row, int64, over all of its documents."""
    if packing is None:
        return (torch.arange(like_BL.shape[1], device=like_BL.device) // block_length).expand(like_BL.shape)
    return (packing.positions_BL % block_length == 0).cumsum(1) - 1
