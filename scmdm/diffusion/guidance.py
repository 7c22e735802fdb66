"""A denoiser as the samplers see it: with the samples' labels, and guided by them (classifier-free guidance).

Guidance draws each revealed token from `p(x | label)^g p(x)^(1 - g)`, normalised (D-CFG, arXiv 2412.10193, applied to
the clean-state prediction: when a position is revealed does not depend on it). It takes both predictions, hence two
denoiser evaluations a step. Each of the two has its own carried estimate, as in training both passes see one label.

Legend: B batch, L length, D width, V vocabulary with the mask, N selected positions, G 1 or, guided, 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from scmdm.diffusion.state import NO_LABEL, State


class Embedder(Protocol):
    """What an estimate is made of."""

    def expected_embedding(self, h_ND: Tensor) -> Tensor: ...

    def embed(self, ids: Tensor) -> Tensor: ...


class SamplingDenoiser(Embedder, Protocol):
    """What the samplers need of a network; `hidden` is the one costly evaluation."""

    def hidden(self, state: State) -> Tensor: ...

    def logits(self, h_ND: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Guided:
    """Hidden states and estimates are those of both predictions side by side, (B, L, G D), the labelled one first."""

    denoiser: SamplingDenoiser
    labels_B: Tensor | None = None  # int64; None: the model sees no labels
    guidance: float = 1.0  # g: 1 is the labelled prediction alone, more moves away from the unlabelled one

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations of each sequence that one of `hidden` takes."""
        return 1 if self.labels_B is None or self.guidance == 1 else 2

    def at(self, rows_N: Tensor) -> Guided:
        """The same for some of the sequences."""
        return self if self.labels_B is None else replace(self, labels_B=self.labels_B[rows_N])

    def hidden(self, z_BL: Tensor, t_B: Tensor, estimate_BLD: Tensor | None) -> Tensor:
        labels = self.labels_B
        if labels is None or self.evaluations == 1:
            return self.denoiser.hidden(State(z_BL, t_B, estimate_BLD, labels_B=labels))
        labels = torch.cat([labels, torch.full_like(labels, NO_LABEL)])
        estimate = None if estimate_BLD is None else torch.cat(estimate_BLD.chunk(2, dim=-1))
        both = self.denoiser.hidden(State(z_BL.repeat(2, 1), t_B.repeat(2), estimate, labels_B=labels))
        return torch.cat(both.chunk(2), dim=-1)

    def logits(self, h_ND: Tensor) -> Tensor:
        """Of the distribution that is drawn from (N, V), float32, minus infinity at the mask."""
        if self.evaluations == 1:
            return self.denoiser.logits(h_ND)
        labelled, plain = (self.denoiser.logits(h).log_softmax(-1) for h in h_ND.chunk(2, dim=-1))
        impossible = labelled.isneginf() | plain.isneginf()
        return (self.guidance * labelled + (1 - self.guidance) * plain).masked_fill(impossible, float("-inf"))

    def expected_embedding(self, h_ND: Tensor) -> Tensor:
        parts = h_ND.chunk(self.evaluations, dim=-1)
        return torch.cat([self.denoiser.expected_embedding(h) for h in parts], dim=-1)

    def embed(self, ids: Tensor) -> Tensor:
        return torch.cat([self.denoiser.embed(ids)] * self.evaluations, dim=-1)
