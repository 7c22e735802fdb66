"""Record of the routers' decisions in a step: tokens per expert, and the losses that balance them.

Only passes with gradients are recorded, between `RoutingRecord.recording` and the backward pass, so that neither the
pass of the estimate nor a recomputation in the backward pass counts.

Both losses are sums over the sequences of a batch, so that they do not depend on how a global batch is divided:

- balance (arXiv 2412.19437, section 2.1.2): a sequence's `E sum_e f_e p_e` times its positions, with `f_e` the share of
  its choices that fell on expert e, and `p_e` the mean of its normalised scores. It is 1 per position when balanced.
- z (arXiv 2202.08906): the squared logarithm of the sum of the exponentials of the logits, of each position.

Legend: B sequences, L length, N tokens, E experts, T experts per token, M layers of experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class RoutingRecord:
    """Counts and losses of all routers of a model since they were last taken."""

    def __init__(self, routers: int, *, balance_loss: float, z_loss: float) -> None:
        self._balance_loss, self._z_loss = balance_loss, z_loss
        self._counts: list[Tensor | None] = [None] * routers
        self._terms: list[Tensor] = []
        self._open = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the passes with gradients in the block."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def add(self, number: int, logits_NE: Tensor, scores_NE: Tensor, experts_NT: Tensor, *, sequences: int) -> None:
        """Add what router `number` decided on the tokens of some sequences of equal length, if this is being recorded.

        The same is computed if it is not: a recomputation must repeat the operators of the forward pass.
        """
        chosen = experts_NT.view(sequences, -1)
        counts_BE = chosen.new_zeros(sequences, scores_NE.shape[1]).scatter_add_(1, chosen, torch.ones_like(chosen))
        terms = []
        if self._balance_loss:
            shares_NE = scores_NE / scores_NE.sum(1, keepdim=True)
            total_BE = shares_NE.unflatten(0, (sequences, -1)).sum(1)
            terms_B = (counts_BE / chosen.shape[1] * total_BE).sum(1) * scores_NE.shape[1]
            terms.append(self._balance_loss * terms_B.sum())
        if self._z_loss:
            terms.append(self._z_loss * logits_NE.logsumexp(1).square().sum())
        if not self._open:
            return
        before = self._counts[number]
        self._counts[number] = counts_BE.sum(0) if before is None else before + counts_BE.sum(0)
        self._terms += terms

    def take_loss(self) -> Tensor | None:
        """Return the differentiable sum of the losses, times their factors, and forget them; None if there is none."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum() if terms else None

    def take_counts(self) -> Tensor:
        """Return the tokens per layer and expert (M, E), int64, and forget them. Every token counts T times."""
        counts = [found for found in self._counts if found is not None]
        self._counts = [None] * len(self._counts)
        return torch.stack(counts)
