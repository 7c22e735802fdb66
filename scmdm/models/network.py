"""What all denoisers have in common: embedding, conditioner, blocks one after the other, output head, entry points.

A kind of network (`scmdm.models.dit`, `scmdm.models.decoder`) says what its blocks are, and what they see besides the
residual stream.

Legend: B batch, L length, D width, K width of a head, V vocabulary with the mask, N masked positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.model import ModelConfig
from scmdm.diffusion.packing import Packing
from scmdm.diffusion.sampler import carried_estimate, estimate_of_rows
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import State, true_positions
from scmdm.models.activation_checkpointing import run_block
from scmdm.models.attention import masks_of
from scmdm.models.conditioner import Conditioner
from scmdm.models.rotary import Rotary
from scmdm.ops.output_head import expected_embedding, weighted_nll_sum
from scmdm.ops.subs_logits import subs_bias, subs_logits
from scmdm.ops.take_rows import take_rows


class TokenEmbedding(nn.Module):
    """One row per token id, the mask among them."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class Network(nn.Module):
    """A denoiser: implements `scmdm.diffusion.objective.Denoiser` and `scmdm.diffusion.sampler.SamplingDenoiser`.

    Without `config.self_conditioned` it has no conditioner and is the plain MDM. A new one has no weights to speak of:
    `scmdm.models.initialization.init_weights`, or those of a file.
    """

    vocab_embed: TokenEmbedding
    rotary_emb: Rotary
    blocks: nn.ModuleList
    output_layer: nn.Module  # with `linear`, None where the head is the embedding
    conditioner: Conditioner | None

    def __init__(self, config: ModelConfig, *, mask_id: int, schedule: Schedule) -> None:
        super().__init__()
        self.config, self.mask_id, self.schedule = config, mask_id, schedule
        self.context: DeviceMesh | None = None

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the output head."""
        linear = self.output_layer.linear
        if linear is None:
            return self.vocab_embed.embedding, None
        assert isinstance(linear, nn.Linear)
        return linear.weight, linear.bias

    def slice_sequences(self, context: DeviceMesh) -> None:
        """Take slices of sequences from now on, this rank's among those of `context`."""
        for module in (self, *self.blocks):
            module.context = context

    def hidden(self, state: State, *, dropout: bool = False) -> Tensor:
        """Final hidden states (B, L, D), ready for the head: one denoiser evaluation."""
        return self._hidden(state, None, dropout)

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """See `Denoiser.estimate`."""
        # A GPU would wait for the host to learn which positions are masked, before it has the pass to do.
        if state.z_BL.device.type != "cpu" or torch.is_grad_enabled() or not self._ends_by_rows(state):
            return carried_estimate(self, self.hidden(state, dropout=dropout), state.z_BL, self.mask_id)
        at_N = true_positions(state.z_BL == self.mask_id)
        return estimate_of_rows(self, self._hidden(state, at_N, dropout).squeeze(0), at_N, state.z_BL)

    def _hidden(self, state: State, at_N: Tensor | None, dropout: bool) -> Tensor:
        """(B, L, D), or (1, N, D) of the positions `at_N` alone, which the last block then goes on with."""
        packing = state.packing
        x_BLD = self._embed_state(state)
        condition = self._condition(state.t_B, state.labels_B)
        rotary, recompute = self._rotary(x_BLD.shape[1], packing), self.config.activation_checkpointing
        masks = masks_of(packing, self.config.attention)
        for block in self.blocks:
            own = (at_N,) if at_N is not None and block is self.blocks[-1] else ()
            x_BLD = run_block(block, recompute, x_BLD, rotary, *condition, dropout and self.training, masks, *own)
        return self._head_input(self._align(self.output_layer(x_BLD, *condition), packing))

    def _ends_by_rows(self, state: State) -> bool:
        """Whether the last block can go on with some positions alone, once it has attended to all."""
        return False

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
        """SUBS logits (N, V) float32 of selected hidden states."""
        weight_VD, bias_V = self._head_tensors()
        with torch.autocast(h_ND.device.type, enabled=False):
            return subs_logits(h_ND, weight_VD, subs_bias(bias_V, self.mask_id))

    def expected_embedding(self, h_ND: Tensor) -> Tensor:
        """Expected embedding (N, D) of the predicted token at selected hidden states."""
        return expected_embedding(
            h_ND,
            *self._head_tensors(),
            self.vocab_embed.embedding,
            mask_id=self.mask_id,
            chunk=self.config.head_chunk,
            top_k=self.config.estimate_top_k,
            rank=self.config.estimate_rank,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding of tokens, any shape in front."""
        return self.vocab_embed(ids)

    def _embed_state(self, state: State) -> Tensor:
        """The residual stream (B, L, D) as it enters the blocks: float32, whatever the precision of the weights."""
        x_BLD = self.vocab_embed(state.z_BL).float()
        if state.estimate_BLD is None:
            return x_BLD
        assert self.conditioner is not None, "an estimate needs a self-conditioned model"
        estimate_BLD = state.estimate_BLD
        if self.config.inject_at == "masked":
            estimate_BLD = estimate_BLD.masked_fill((state.z_BL != self.mask_id)[..., None], 0)
        return x_BLD + self.conditioner(estimate_BLD)

    def _condition(self, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, ...]:
        """What blocks and output layer see besides the residual stream."""
        assert labels_B is None, "this kind of network knows no labels"
        return ()

    def _align(self, h_BLD: Tensor, packing: Packing | None) -> Tensor:
        """Put the hidden state that predicts a position at that position."""
        return h_BLD

    def _head_tensors(self) -> tuple[Tensor, Tensor]:
        weight_VD, bias_V = self.head()
        return weight_VD, weight_VD.new_zeros(len(weight_VD)) if bias_V is None else bias_V

    def _rotary(self, length: int, packing: Packing | None) -> Tensor:
        """The table's rows for the positions at hand."""
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
    """Number of parameters, or of those that are trained, of the whole model also where an engine has sharded it."""
    # DeepSpeed's stage 3 empties a parameter and keeps its size beside it.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained)
