"""Denoiser interface of the samplers, and classifier-free guidance by labels.

Guidance draws each revealed token from `p(x | label)^g p(x)^(1 - g)`, normalised: D-CFG (arXiv 2412.10193) applied to
the clean-state prediction, which does not change when positions are revealed. A step needs both predictions, hence two
denoiser evaluations. Each prediction carries its own estimate, because both passes of training see the same label.

Legend: B batch, L length, D width, V vocabulary with the mask, N selected positions, G predictions (1, guided: 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from scmdm.diffusion.state import NO_LABEL, State


class Embedder(Protocol):
    """Maps of a network from which an estimate is computed."""

    def expected_embedding(self, h_ND: Tensor) -> Tensor:
        """Return the expected embedding (N, D) of the predicted token."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids of any shape, (..., D)."""
        ...


class SamplingDenoiser(Embedder, Protocol):
    """The interface of a network that the samplers use."""

    def hidden(self, state: State) -> Tensor:
        """Evaluate the network: final hidden states (B, L, D)."""
        ...

    def logits(self, h_ND: Tensor) -> Tensor:
        """Return float32 logits (N, V), minus infinity at the mask."""
        ...


@dataclass(frozen=True)
class Guided:
    """A denoiser with the labels of the samples, guided if `guidance` is not 1.

    Hidden states and estimates are (B, L, G D): those of the labelled prediction, then those of the unlabelled one.
    """

    denoiser: SamplingDenoiser
    labels_B: Tensor | None = None  # int64; None: a model without labels
    guidance: float = 1.0  # g; 1: the labelled prediction alone; above 1: away from the unlabelled one

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations per sequence and call of `hidden`."""
        return 1 if self.labels_B is None or self.guidance == 1 else 2

    def at(self, rows_N: Tensor) -> Guided:
        """Return the denoiser of a selection of sequences."""
        return self if self.labels_B is None else replace(self, labels_B=self.labels_B[rows_N])

    def hidden(self, z_BL: Tensor, t_B: Tensor, estimate_BLD: Tensor | None) -> Tensor:
        """Evaluate the denoiser: hidden states (B, L, G D)."""
        labels = self.labels_B
        if labels is None or self.evaluations == 1:
            return self.denoiser.hidden(State(z_BL, t_B, estimate_BLD, labels_B=labels))
        labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])
        estimate = None if estimate_BLD is None else torch.cat(estimate_BLD.chunk(2, dim=-1))
        both = self.denoiser.hidden(State(z_BL.repeat(2, 1), t_B.repeat(2), estimate, labels_B=labels))
        return torch.cat(both.chunk(2), dim=-1)

    def logits(self, h_ND: Tensor) -> Tensor:
        """Return logits (N, V) of the guided distribution, float32, minus infinity at the mask."""
        if self.evaluations == 1:
            return self.denoiser.logits(h_ND)
        labelled, plain = (self.denoiser.logits(h).log_softmax(-1) for h in h_ND.chunk(2, dim=-1))
        impossible = labelled.isneginf() | plain.isneginf()
        return (self.guidance * labelled + (1 - self.guidance) * plain).masked_fill(impossible, float("-inf"))

    def expected_embedding(self, h_ND: Tensor) -> Tensor:
        """Return the expected embeddings (N, G D) of each prediction."""
        parts = h_ND.chunk(self.evaluations, dim=-1)
        return torch.cat([self.denoiser.expected_embedding(h) for h in parts], dim=-1)

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids for each prediction, (..., G D)."""
        return torch.cat([self.denoiser.embed(ids)] * self.evaluations, dim=-1)
