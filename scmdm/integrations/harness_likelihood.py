"""Likelihoods of continuations for the lm-evaluation-harness, and whether greedy decoding yields them.

A sequence is `[BOS] context continuation tail`, without [BOS] if `add_bos_token=false`. The tail fills the sequence up
to the model's length and is masked, as during sampling; with `tail=none` there is no tail, as in the evaluation of
LLaDA.

Legend: B batch, L length, K masked states of a continuation, N tokens of a continuation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.config.fields import require
from scmdm.diffusion.continuation import greedy_agrees, masked_nll, masked_states
from scmdm.distributed.engine import compute_context
from scmdm.integrations.harness_options import HarnessOptions
from scmdm.models.model_files import LoadedModel


@dataclass(frozen=True)
class Piece:
    """Part of a continuation that fits into a sequence, with as much context as fits before it."""

    request: int
    context: list[int]
    ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of context and piece."""
        return len(self.context) + len(self.ids)


class ContinuationScorer:
    """Likelihoods and greediness of continuations under a loaded model.

    Args:
        loaded: the model.
        options: arguments of the model in the harness.
        prefix: tokens that sequences begin with.
        carry: whether a prediction is conditioned on the model's own estimate.
        precision: dtype of the computation.
        states_at_once: masked states in a batch.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: HarnessOptions,
        prefix: list[int],
        *,
        carry: bool,
        precision: torch.dtype,
        states_at_once: int,
    ) -> None:
        self._loaded, self._options, self._prefix, self._carry = loaded, options, prefix, carry
        self._precision, self._states_at_once = precision, states_at_once
        self._device = next(loaded.model.parameters()).device

    def row(self, ids: list[int], masks: int = 0) -> tuple[Tensor, Tensor]:
        """Return a sequence (L,) of prefix, ids, masks and tail, and a bool mask (L,) of the tail."""
        tokenizer = self._loaded.tokenizer
        row = torch.tensor([*self._prefix, *ids, *[tokenizer.mask_id] * masks], dtype=torch.int64)
        rest = self._loaded.spec.length - len(row) if self._options.tail == "masked" else 0
        tail = torch.arange(len(row) + rest) >= len(row)
        return torch.cat([row, row.new_full((rest,), tokenizer.eos_id)]), tail

    def _target(self, piece: Piece, length: int) -> Tensor:
        """Return a mask (L,) of the positions of a piece's continuation."""
        at_L, start = torch.arange(length), len(self._prefix) + len(piece.context)
        return (at_L >= start) & (at_L < start + len(piece.ids))

    def _states(self, piece: Piece) -> tuple[Tensor, ...]:
        """Return tokens, masked, weights and context positions (K, L) of states, and masked fractions (K,)."""
        states = masked_states(
            len(piece.ids),
            self._options.draws,
            seed=self._options.seed,
            key=request_key(piece.context, *piece.ids),
            start=len(self._prefix) + len(piece.context),
            block_length=self._loaded.spec.diffusion.block_length,
        )
        row, tail = self.row([*piece.context, *piece.ids])
        target = self._target(piece, len(row))
        weight = torch.zeros(len(states.masked_KN), len(row), dtype=torch.float64)
        weight[:, target] = states.weight_KN
        context = (~target & ~tail).expand_as(weight)
        share = states.masked_KN.double().mean(1)
        return row.expand(weight.shape), (weight > 0) | tail, weight, context, share

    def nll(self, group: Sequence[Piece]) -> list[float]:
        """Estimate an upper bound of each piece's negative log-likelihood, in nats."""
        blocks = self._loaded.spec.diffusion.block_length
        possible = blocks is None or self._options.cfg == 0
        require(possible, "cfg", self._options.cfg, f"0 for likelihoods with diffusion.block_length={blocks}")
        parts = [self._states(piece) for piece in group]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        found = []
        with compute_context(self._device, self._precision):
            for batch in zip(*(column.split(self._states_at_once) for column in columns), strict=True):
                x, masked, weight, context, share = (part.to(self._device) for part in batch)
                nll_B = masked_nll(
                    self._loaded.model,
                    x,
                    masked,
                    weight,
                    share,
                    schedule=self._loaded.spec.schedule,
                    mask_id=self._loaded.spec.mask_id,
                    condition=self._carry,
                    guidance=self._options.cfg + 1,
                    prompt_BL=context,
                    model_of_blocks=blocks is not None,
                )
                found.append(nll_B.cpu())
        return [float(own.sum()) for own in torch.cat(found).split([len(part[-1]) for part in parts])]

    def greedy(self, group: Sequence[Piece]) -> list[bool]:
        """Return whether greedy decoding reproduces each piece; never without `is_check_greedy`."""
        if not self._options.is_check_greedy:
            return [False] * len(group)
        rows, targets, tails = [], [], []
        for piece in group:
            row, tail = self.row([*piece.context, *piece.ids])
            rows.append(row)
            targets.append(self._target(piece, len(row)))
            tails.append(tail)
        x, target, tail = (torch.stack(parts).to(self._device) for parts in (rows, targets, tails))
        with compute_context(self._device, self._precision):
            agrees_B = greedy_agrees(
                self._loaded.model,
                x,
                target,
                tail,
                schedule=self._loaded.spec.schedule,
                mask_id=self._loaded.spec.mask_id,
                carry=self._carry,
                guidance=self._options.cfg + 1,
                prompt_BL=~target & ~tail,
                block_length=self._loaded.spec.diffusion.block_length,
            )
        return [bool(agrees) for agrees in agrees_B]


def windows(context: list[int], continuation: list[int], size: int) -> list[tuple[list[int], list[int]]]:
    """Split a continuation into pieces of at most `size` ids, each with the ids before it as its context.

    Context and piece together have at most `size` ids; a longer context is cut on the left.
    """
    found, known = [], list(context)
    for at in range(0, len(continuation), size):
        piece = continuation[at : at + size]
        found.append((known[max(0, len(known) + len(piece) - size) :], piece))
        known += piece
    return found


def request_key(context: list[int], *more: int) -> int:
    """Key of a request's random draws, independent of other requests; 40 bits, because samplers multiply it by L."""
    return int.from_bytes(hashlib.sha256(repr((context, more)).encode()).digest()[:5], "little")
