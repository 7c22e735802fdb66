"""Denoiser interface of the samplers, and classifier-free guidance by labels or by the prompt.

Guidance draws each revealed token from `p(x | condition)^g p(x)^(1 - g)`, normalised: D-CFG (arXiv 2412.10193) applied
to the clean-state prediction, which does not change when positions are revealed. The condition is the label, or the
prompt: `p(x)` is then predicted with the prompt masked, as in LLaDA (arXiv 2502.09992, appendix A.2), whose `cfg_scale`
is `g - 1`. A step needs both predictions, hence two denoiser evaluations. Each prediction carries its own estimate,
because both passes of training see the same input.

Legend: B batch, L length, D width, V vocabulary with the mask, N selected positions, G predictions (1, guided: 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from scmdm.diffusion.key_value_cache import Window
from scmdm.diffusion.packing import Packing
from scmdm.diffusion.state import NO_LABEL, State


class SamplingDenoiser(Protocol):
    """The interface of a network that the samplers use."""

    def hidden(self, state: State) -> Tensor:
        """Evaluate the network: final hidden states (B, L, D)."""
        ...

    def logits(self, h_ND: Tensor) -> Tensor:
        """Return float32 logits (N, V), minus infinity at the mask."""
        ...

    def carried(self, h_BLD: Tensor, z_BL: Tensor) -> Tensor:
        """Return the estimate from these hidden states that the next evaluation, of `z_BL`, is conditioned on.

        It is a tensor (B, L, C) for `State.estimate_BLD`, in which zeros are the null estimate.
        """
        ...


@dataclass(frozen=True)
class Guided:
    """A denoiser with the labels of the samples, guided if `guidance` is not 1 and there is a condition.

    Hidden states and estimates are (B, L, G D): those of the conditioned prediction, then those of the other one.
    """

    denoiser: SamplingDenoiser
    mask_id: int
    labels_B: Tensor | None = None  # int64; None: a model without labels
    guidance: float = 1.0  # g; 1: the conditioned prediction alone; above 1: away from the other one
    prompt_BL: Tensor | None = None  # bool: positions masked in the other prediction; None: it lacks the label
    packing: Packing | None = None
    window: Window | None = None  # the sequences are this part of longer ones

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations per sequence and call of `hidden`."""
        conditioned = self.labels_B is not None or self.prompt_BL is not None
        return 2 if conditioned and self.guidance != 1 else 1

    def at(self, rows_N: Tensor) -> Guided:
        """Return the denoiser of a selection of sequences."""
        parts = {name: getattr(self, name) for name in ("labels_B", "prompt_BL", "packing")}
        return replace(self, **{name: part[rows_N] for name, part in parts.items() if part is not None})

    def within(self, window: Window) -> Guided:
        """Return the denoiser of a window of these sequences."""
        prompt_BW = None if self.prompt_BL is None else window.cut(self.prompt_BL)
        return replace(self, window=window, prompt_BL=prompt_BW)

    def inputs(self, z_BL: Tensor) -> list[Tensor]:
        """Return the sequences (B, L) that each prediction sees."""
        if self.evaluations == 1:
            return [z_BL]
        return [z_BL, z_BL if self.prompt_BL is None else z_BL.masked_fill(self.prompt_BL, self.mask_id)]

    def hidden(self, z_BL: Tensor, t_B: Tensor, estimate_BLD: Tensor | None) -> Tensor:
        """Evaluate the denoiser: hidden states (B, L, G D)."""
        labels, packing = self.labels_B, self.packing
        if self.evaluations == 1:
            return self.denoiser.hidden(State(z_BL, t_B, estimate_BLD, packing, labels, window=self.window))
        if labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, NO_LABEL) if self.prompt_BL is None else labels])
        estimate = None if estimate_BLD is None else torch.cat(estimate_BLD.chunk(2, dim=-1))
        packing = None if packing is None else packing.repeat(2)
        window = None if self.window is None else self.window.twice()
        state = State(torch.cat(self.inputs(z_BL)), t_B.repeat(2), estimate, packing, labels, window=window)
        both = self.denoiser.hidden(state)
        return torch.cat(both.chunk(2), dim=-1)

    def logits(self, h_ND: Tensor) -> Tensor:
        """Return logits (N, V) of the guided distribution, float32, minus infinity at the mask."""
        if self.evaluations == 1:
            return self.denoiser.logits(h_ND)
        conditioned, plain = (self.denoiser.logits(h).log_softmax(-1) for h in h_ND.chunk(2, dim=-1))
        impossible = conditioned.isneginf() | plain.isneginf()
        return (self.guidance * conditioned + (1 - self.guidance) * plain).masked_fill(impossible, float("-inf"))

    def carried_estimate(self, h_BLD: Tensor, z_BL: Tensor) -> Tensor:
        """Return the estimates (B, L, G D) for the next evaluation, whose input is `z_BL`."""
        parts = zip(h_BLD.chunk(self.evaluations, dim=-1), self.inputs(z_BL), strict=True)
        return torch.cat([self.denoiser.carried(h, z) for h, z in parts], dim=-1)
