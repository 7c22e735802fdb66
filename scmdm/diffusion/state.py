"""Clean sequences, and the inputs of a denoiser evaluation.

Legend: B batch, L length, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scmdm.diffusion.key_value_cache import Window
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.packing import Packing

NO_LABEL = -1


@dataclass(frozen=True)
class Sequences:
    """Clean sequences; all tensors have the same rows."""

    tokens: Tensor  # (B, L) int64
    valid: Tensor  # (B, L) bool: counts in the likelihood
    ids: Tensor  # (B,) int64: keys of all noise
    documents: Tensor | None = None  # (B, L) int64: number of each token's document, in packed samples
    labels: Tensor | None = None  # (B,) int64: labels, for a model that is conditioned on them
    lengths: Tensor | None = None  # (B,) int64, on the CPU: lengths without padding that is cut off or not seen
    maskable: Tensor | None = None  # (B, L) bool: may be masked, the valid tokens among others; None: these alone

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Sequences:
        names = ("documents", "labels", "lengths", "maskable")
        more = {name: column[rows] for name in names if (column := getattr(self, name)) is not None}
        return Sequences(self.tokens[rows], self.valid[rows], self.ids[rows], **more)

    def cropped(self) -> Sequences:
        """Return the sequences up to the longest of `lengths`; the rest of a shorter one is a document of its own."""
        if self.lengths is None:
            return self
        longest, shortest = int(self.lengths.max()), int(self.lengths.min())
        tokens_BL, documents_BL = self.tokens[:, :longest], None
        if shortest < longest:
            at_L = torch.arange(longest, device=tokens_BL.device)
            documents_BL = (at_L >= self.lengths.to(tokens_BL.device)[:, None]).long()
        maskable = None if self.maskable is None else self.maskable[:, :longest]
        valid = self.valid[:, :longest]
        return replace(self, tokens=tokens_BL, valid=valid, documents=documents_BL, maskable=maskable)


class ResidualStream:
    """A residual stream (B, L, D) that all passes on one state share; (B, 2 L, D) with a clean copy.

    This is not a dataclass, so that FSDP2 does not find the tensor among the arguments of a call: it would reduce the
    gradients of the outermost weights when the backward pass arrives there, and again after the shared blocks.
    """

    def __init__(self, x_BLD: Tensor) -> None:
        self.x_BLD = x_BLD

    def detach(self) -> ResidualStream:
        """Return the stream without its gradient."""
        return ResidualStream(self.x_BLD.detach())


@dataclass(frozen=True)
class State:
    """Input of a denoiser evaluation."""

    z_BL: Tensor  # int64, noised tokens
    t_B: Tensor  # float64, times
    estimate_BLD: Tensor | None = None  # expected embedding of the clean tokens; None: the null estimate
    packing: Packing | None = None  # several documents in each row
    labels_B: Tensor | None = None  # int64, label of each sequence or NO_LABEL; None: none has one
    clean_BL: Tensor | None = None  # int64, clean copy of the sequences, for a model of blocks (`diffusion.blocks`)
    window: Window | None = None  # the tokens are a part of longer sequences, of which the rest is in a cache
    visible_LL: Tensor | None = None  # bool, pairs of a query and a key that it sees, besides `packing`; None: all
    lower: ResidualStream | None = None  # result of `Denoiser.lower` for this state; None: not computed
    next_BL: Tensor | None = None  # int64, tokens for which `Denoiser.estimate` makes the estimate; None: `z_BL`
    perturbation_BLD: Tensor | None = None  # added by `Denoiser.estimate`, in units of the root mean square


def drop_labels(labels_B: Tensor, ids_B: Tensor, *, rate: float, seed: int, step: int) -> Tensor:
    """Replace each label by NO_LABEL with probability `rate` (classifier-free guidance, arXiv 2207.12598, alg. 1).

    The model thereby also learns the unlabelled prediction that guidance needs.
    """
    dropped_B = keyed_uniform(seed, "label", step, ids_B, 1)[:, 0] < rate
    return torch.where(dropped_B, NO_LABEL, labels_B)


def true_positions(mask_BL: Tensor) -> Tensor:
    """Return the indices (N,) of true elements of a mask in row-major order."""
    return mask_BL.flatten().nonzero().squeeze(1)
