"""Base of all denoisers: embedding, conditioner, a sequence of blocks, output head, and the denoiser interface.

A kind of denoiser (`scmdm.models.dit`, `scmdm.models.decoder`) defines its blocks and their
conditioning tensors. To add one, subclass `Network` and `ModelConfig`, and register it in
`scmdm.config.model.DENOISERS`.

Legend: B batch, L length, D width, K width of a head, V vocabulary with the mask, N masked positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.model import ModelConfig
from scmdm.diffusion.guidance import carried_estimate
from scmdm.diffusion.packing import Packing
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import State, true_positions
from scmdm.models.activation_checkpointing import run_block
from scmdm.models.attention import Masks, masks_of
from scmdm.models.conditioner import Conditioner
from scmdm.models.rotary import Rotary
from scmdm.ops.output_head import expected_embedding, weighted_nll_sum
from scmdm.ops.subs_logits import subs_bias, subs_logits
from scmdm.ops.take_rows import take_rows


class TokenEmbedding(nn.Module):
    """Embedding of token ids, including the mask."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids of any shape, (..., D)."""
        return F.embedding(ids, self.embedding)


class Network(nn.Module):
    """A denoiser: implements `scmdm.diffusion.objective.Denoiser` and `scmdm.diffusion.sampler.SamplingDenoiser`.

    Without `config.self_conditioned` there is no conditioner, and the model is a plain masked diffusion model.
    Parameters are uninitialised: use `scmdm.models.initialization.init_weights`, or read weights from files.
    """

    Config: ClassVar[type[ModelConfig]]  # keys of this kind of denoiser
    vocab_embed: TokenEmbedding
    rotary_emb: Rotary
    blocks: nn.ModuleList
    output_layer: nn.Module  # its attribute `linear` is the output head, or None if the embedding is tied
    conditioner: Conditioner | None

    def __init__(self, config: ModelConfig, *, mask_id: int, schedule: Schedule) -> None:
        super().__init__()
        self.config, self.mask_id, self.schedule = config, mask_id, schedule
        self.context: DeviceMesh | None = None
        # Unbound: a bound method would refer to the model, whose memory would then be freed late.
        self._run_trunk: Callable[..., Tensor] = type(self)._trunk

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (V, D) and bias (V,) of the output head; bias is None if there is none."""
        linear = self.output_layer.linear
        if linear is None:
            return self.vocab_embed.embedding, None
        assert isinstance(linear, nn.Linear)
        return linear.weight, linear.bias

    def slice_sequences(self, context: DeviceMesh) -> None:
        """Switch to sliced sequences: each rank of `context` holds one slice of every sequence, in rank order."""
        for module in (self, *self.blocks):
            module.context = context

    def compile_trunk(self) -> None:
        """Compile all blocks and the output layer's norm as one graph. What would break the graph raises an error."""
        self._run_trunk = torch.compile(type(self)._trunk, fullgraph=True)

    def hidden(self, state: State, *, dropout: bool = False) -> Tensor:
        """Evaluate the denoiser: final hidden states (B, L, D) in the dtype of the output head.

        `dropout` applies dropout in training mode only.
        """
        packing = state.packing
        x_BLD = self._embed_state(state).to(self._residual_dtype(state.z_BL.device))
        condition = self._condition(state.t_B, state.labels_B)
        rotary, masks = self._rotary(x_BLD.shape[1], packing), masks_of(packing, self.config.attention)
        h_BLD = self._run_trunk(self, x_BLD, rotary, condition, dropout and self.training, masks)
        return self._head_input(self._align(h_BLD, packing))

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """See `Denoiser.estimate`."""
        return carried_estimate(self, self.hidden(state, dropout=dropout), state.z_BL, self.mask_id)

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        """See `Denoiser.weighted_nll`."""
        at_N = true_positions(state.z_BL == self.mask_id)
        h_BLD = self.hidden(state, dropout=True)
        total, nll_N = weighted_nll_sum(
            take_rows(h_BLD.flatten(0, 1), at_N),
            *self._head_tensors(),
            x_BL.flatten()[at_N],
            weight_BL.flatten()[at_N],
            mask_id=self.mask_id,
            chunk=self.config.head_chunk,
        )
        return total, weight_BL.new_zeros(x_BL.numel()).index_copy(0, at_N, nll_N).view_as(x_BL)

    def logits(self, h_ND: Tensor) -> Tensor:
        """Return float32 logits (N, V) of hidden states (N, D); the mask has minus infinity."""
        weight_VD, bias_V = self._head_tensors()
        with torch.autocast(h_ND.device.type, enabled=False):
            return subs_logits(h_ND, weight_VD, subs_bias(bias_V, self.mask_id))

    def expected_embedding(self, h_ND: Tensor) -> Tensor:
        """Return the expected embedding (N, D) of the predicted token for hidden states (N, D)."""
        return expected_embedding(
            h_ND,
            *self._head_tensors(),
            self.vocab_embed.embedding,
            mask_id=self.mask_id,
            chunk=self.config.head_chunk,
            top_k=self.config.estimate_top_k,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids of any shape, (..., D)."""
        return self.vocab_embed(ids)

    def _trunk(
        self, x_BLD: Tensor, rotary: Tensor, condition: tuple[Tensor, ...], dropout: bool, masks: Masks
    ) -> Tensor:
        """Run blocks and output layer: from the residual stream to normalised hidden states."""
        for block in self.blocks:
            kind = self.config.activation_checkpointing
            x_BLD = run_block(block, kind, x_BLD, rotary, *condition, dropout, masks)
        h_BLD: Tensor = self.output_layer(x_BLD, *condition)
        return h_BLD

    def _residual_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of the residual stream between blocks; norms compute in float32 either way."""
        if self.config.residual_precision == "float32" or not torch.is_autocast_enabled(device.type):
            return torch.float32
        return torch.get_autocast_dtype(device.type)

    def _embed_state(self, state: State) -> Tensor:
        """Return the input (B, L, D) of the first block, in float32 for any dtype of the weights."""
        x_BLD = self.vocab_embed(state.z_BL).float()
        if state.estimate_BLD is None:
            return x_BLD
        assert self.conditioner is not None, "the model has no conditioner"
        estimate_BLD = state.estimate_BLD
        if self.config.inject_at == "masked":
            estimate_BLD = estimate_BLD.masked_fill((state.z_BL != self.mask_id)[..., None], 0)
        return x_BLD + self.conditioner(estimate_BLD)

    def _condition(self, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, ...]:
        """Return the tensors that condition blocks and output layer, besides the residual stream."""
        assert labels_B is None, "this kind of denoiser has no labels"
        return ()

    def _align(self, h_BLD: Tensor, packing: Packing | None) -> Tensor:
        """Move each hidden state to the position that it predicts."""
        return h_BLD

    def _head_tensors(self) -> tuple[Tensor, Tensor]:
        weight_VD, bias_V = self.head()
        return weight_VD, weight_VD.new_zeros(len(weight_VD)) if bias_V is None else bias_V

    def _rotary(self, length: int, packing: Packing | None) -> Tensor:
        """Return the rows of the rotary table for the positions of a batch, or of this rank's slice."""
        if packing is not None:
            return self.rotary_emb(length)[packing.positions_BL]
        if self.context is None:
            return self.rotary_emb(length)
        start = length * self.context.get_local_rank()
        return self.rotary_emb(length * self.context.size())[start : start + length]

    def _head_input(self, h_BLD: Tensor) -> Tensor:
        if self.config.head_precision == "float32" or not torch.is_autocast_enabled(h_BLD.device.type):
            return h_BLD.to(self.head()[0].dtype)
        return h_BLD.to(torch.get_autocast_dtype(h_BLD.device.type))


def count_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """Count the parameters of the whole, possibly sharded, model; with `trained`, those that need gradients."""
    # DeepSpeed stage 3 empties parameters and keeps their size in `ds_numel`.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained)
