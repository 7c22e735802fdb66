"""Base of all denoisers: embedding, conditioner, a sequence of blocks, output head, and the denoiser interface.

A kind of denoiser (`scmdm.models.dit`, `scmdm.models.decoder`) defines its blocks and what conditions them. To add one,
subclass `Network` and `ModelConfig`, and register it in `scmdm.config.model.DENOISERS`.

Legend: B batch, L length, D width, V vocabulary with the mask, N masked positions, C channels of what is carried: D, or
D + 1 with a confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.model import ModelConfig
from scmdm.diffusion.key_value_cache import LayerCache, Window
from scmdm.diffusion.packing import Packing
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import State, true_positions
from scmdm.models.activation_checkpointing import run_block
from scmdm.models.attention import NO_MASKS, Masks, masks_of, masks_of_blocks, masks_of_window
from scmdm.models.conditioner import Conditioner, Interpolation
from scmdm.models.experts.expert_block import ExpertMixture, whole_parameters
from scmdm.models.rotary import Rotary
from scmdm.ops.grouped_product import compute_dtype
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


class BlockInputs(NamedTuple):
    """What all blocks of an evaluation get besides the residual stream."""

    rotary: Tensor  # table of `Rotary`
    condition: tuple[Tensor, ...]
    dropout: bool
    masks: Masks
    window: Window | None


class AroundBlocks(Protocol):
    """What an engine does around each block, outside of what activation checkpointing runs again."""

    def before(self, number: int) -> None:
        """Prepare a block's forward pass."""
        ...

    def after(self, number: int, x_BLD: Tensor) -> None:
        """End it; `x_BLD` is its result."""
        ...


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
    conditioner: Conditioner | Interpolation | None

    def __init__(self, config: ModelConfig, *, mask_id: int, schedule: Schedule) -> None:
        super().__init__()
        self.config, self.mask_id, self.schedule = config, mask_id, schedule
        self.context: DeviceMesh | None = None
        self.around_blocks: AroundBlocks | None = None
        self.inject_layer = config.inject_layer if config.self_conditioned else 0
        # Unbound: a bound method would refer to the model, whose memory would then be freed late.
        self._run_lower: Callable[..., Tensor] = type(self)._lower_blocks
        self._run_upper: Callable[..., Tensor] = type(self)._upper_blocks
        self._has_compiled_blocks = False
        self.block_length: int | None = None  # of a model of blocks (`scmdm.diffusion.blocks`)
        self._last_masks: tuple[object, Masks] = None, NO_MASKS

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

    def compile_blocks(self, **arguments: Any) -> None:
        """Compile each block with these arguments of `torch.compile`; one graph serves all.

        Evaluations of windows are not compiled: with torch 2.14 a compiled block returned values that differ from those
        in the cache.
        """
        self._has_compiled_blocks = True
        for module in self.modules():
            if isinstance(module, ExpertMixture):
                module.leave_out_of_graphs()
        for block in self.blocks:
            block.compile(**arguments)

    def compile_trunk(self, **arguments: Any) -> None:
        """Compile all blocks and the output layer's norm as one graph. What would break the graph raises an error.

        If the estimate enters at a later block, the blocks below it are a graph of their own.
        """
        self._run_lower = torch.compile(type(self)._lower_blocks, fullgraph=True, **arguments)
        self._run_upper = torch.compile(type(self)._upper_blocks, fullgraph=True, **arguments)

    def hidden(self, state: State, *, dropout: bool = False) -> Tensor:
        """Evaluate the denoiser: final hidden states (B, L, D) in the dtype of the output head.

        `dropout` applies dropout in training mode only.
        """
        inputs, length = self._block_inputs(state, dropout), state.z_BL.shape[1]
        x_BLD = self._before_estimate(state, inputs) if state.lower is None else state.lower.x_BLD
        x_BLD = self._residual_stream(self._add_estimate(x_BLD, state))
        h_BLD = self._run_upper(self, x_BLD, inputs)
        clean_BLD = h_BLD[:, length:] if state.clean_BL is not None else None
        return self._head_input(self._align(h_BLD[:, :length], _positions(state), clean_BLD))

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        """See `Denoiser.lower`."""
        if not self.inject_layer:
            return None
        return self._before_estimate(state, self._block_inputs(state, dropout))

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        """See `Denoiser.estimate`."""
        h_BLD = self.hidden(state, dropout=dropout)
        z_BL = state.z_BL if state.next_BL is None else state.next_BL
        carried_BLC = self.carried(h_BLD, z_BL)
        if state.perturbation_BLD is None:
            return carried_BLC
        return carried_BLC + self._perturbation(carried_BLC, state.perturbation_BLD, z_BL).to(carried_BLC.dtype)

    def carried(self, h_BLD: Tensor, z_BL: Tensor) -> Tensor:
        """See `SamplingDenoiser.carried`.

        By SUBS, the estimate of a position where `z_BL` is not masked is its token, with certainty.
        """
        if self.config.carried == "hidden":
            return h_BLD
        at_N = true_positions(z_BL == self.mask_id)
        predicted_NC = self.expected_embedding(h_BLD.flatten(0, 1)[at_N])
        known_BLC = self.embed(z_BL)
        if self.config.mixing == "interpolated":
            known_BLC = F.pad(known_BLC, (0, 1), value=1.0)
        return known_BLC.flatten(0, 1).index_copy(0, at_N, predicted_NC).unflatten(0, z_BL.shape)

    def _perturbation(self, carried_BLC: Tensor, noise_BLD: Tensor, z_BL: Tensor) -> Tensor:
        """Scale noise to the root mean square of embeddings or of each hidden state.

        Estimates are perturbed at masked positions alone: those of tokens are exact. A confidence is not perturbed.
        """
        if self.config.carried == "hidden":
            return noise_BLD * carried_BLC.float().square().mean(-1, keepdim=True).sqrt()
        scale = self.vocab_embed.embedding.float().square().mean().sqrt()
        perturbation_BLD = (noise_BLD * scale).masked_fill((z_BL != self.mask_id)[..., None], 0)
        return F.pad(perturbation_BLD, (0, carried_BLC.shape[-1] - noise_BLD.shape[-1]))

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
        """Return the expected embedding (N, D) of the predicted token for hidden states (N, D).

        With `mixing=interpolated` one more column is the confidence of the prediction.
        """
        return expected_embedding(
            h_ND,
            *self._head_tensors(),
            self.vocab_embed.embedding,
            mask_id=self.mask_id,
            chunk=self.config.head_chunk,
            top_k=self.config.estimate_top_k,
            temperature=self.config.estimate_temperature,
            confidence=self.config.confidence if self.config.mixing == "interpolated" else None,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Embed token ids of any shape, (..., D)."""
        return self.vocab_embed(ids)

    def _block_inputs(self, state: State, dropout: bool) -> BlockInputs:
        """Return what all blocks get besides the residual stream."""
        assert (state.clean_BL is None) or (self.block_length is not None and state.window is None)
        condition = self._condition(state.t_B, state.labels_B)
        rotary = self._rotary(state.z_BL.shape[1], state.packing, state.window)
        if state.clean_BL is not None:  # two copies, whose positions are the same
            rotary = torch.cat([rotary, rotary], dim=-3)
        return BlockInputs(rotary, condition, dropout and self.training, self._masks(state), state.window)

    def _before_estimate(self, state: State, inputs: BlockInputs) -> Tensor:
        """Return the residual stream to which the mapped estimate is added, of both copies."""
        ids_BL = state.z_BL if state.clean_BL is None else torch.cat([state.z_BL, state.clean_BL], dim=1)
        x_BLD = self._embed_tokens(ids_BL)
        return self._run_lower(self, self._residual_stream(x_BLD), inputs) if self.inject_layer else x_BLD

    def _lower_blocks(self, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        """Run the blocks below the one at which the estimate enters."""
        return self._run_blocks(range(self.inject_layer), x_BLD, inputs)

    def _upper_blocks(self, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        """Run the other blocks and the output layer: normalised hidden states."""
        x_BLD = self._run_blocks(range(self.inject_layer, len(self.blocks)), x_BLD, inputs)
        h_BLD: Tensor = self.output_layer(x_BLD, *inputs.condition)
        return h_BLD

    def _run_blocks(self, numbers: range, x_BLD: Tensor, inputs: BlockInputs) -> Tensor:
        kind, masks = self.config.activation_checkpointing, inputs.masks
        for number in numbers:
            if inputs.window is not None:
                masks = masks._replace(cache=LayerCache(inputs.window, number))
            own = inputs.rotary, *inputs.condition, inputs.dropout, masks
            if self.around_blocks is not None:
                self.around_blocks.before(number)
            is_eager = self._has_compiled_blocks and inputs.window is not None
            block: Callable[..., Tensor] = self.blocks[number].forward if is_eager else self.blocks[number]
            x_BLD = run_block(block, kind, x_BLD, *own)
            if self.around_blocks is not None:
                self.around_blocks.after(number, x_BLD)
        return x_BLD

    def _residual_stream(self, x_BLD: Tensor) -> Tensor:
        """Cast a block's input to the residual stream's dtype; norms compute in float32 either way."""
        return x_BLD if self.config.residual_precision == "float32" else x_BLD.to(compute_dtype(x_BLD))

    def _embed_tokens(self, ids_BL: Tensor) -> Tensor:
        """Return the token embeddings (B, L, D) in float32 for any dtype of the weights."""
        return self._scaled(self.vocab_embed(ids_BL).float())

    def _add_estimate(self, x_BLD: Tensor, state: State) -> Tensor:
        """Mix what is carried into the residual stream, but not into that of the clean copy."""
        if state.estimate_BLD is None:
            return x_BLD
        assert self.conditioner is not None, "the model has no conditioner"
        carried_BLC, length = state.estimate_BLD, state.z_BL.shape[1]
        if self.config.inject_at == "masked" or self.config.mixing == "interpolated":
            carried_BLC = carried_BLC.masked_fill((state.z_BL != self.mask_id)[..., None], 0)
        if state.clean_BL is None:
            return x_BLD + self._term(x_BLD, carried_BLC)
        own_BLD, clean_BLD = x_BLD[:, :length], x_BLD[:, length:]
        return torch.cat([own_BLD + self._term(own_BLD, carried_BLC), clean_BLD], dim=1)

    def _term(self, x_BLD: Tensor, carried_BLC: Tensor) -> Tensor:
        """Return what is added to the residual stream: the mapped estimate, or a step of the mask towards it."""
        assert self.conditioner is not None
        if self.config.mixing == "added":
            return self._scaled(self.conditioner(carried_BLC))
        share_BL1 = self.conditioner(carried_BLC[..., -1:])
        return share_BL1 * (self._scaled(carried_BLC[..., :-1].float()) - x_BLD)

    def _scaled(self, x_BLD: Tensor) -> Tensor:
        """Scale token embeddings and mapped estimates alike, so that the conditioner works at the embedding's scale."""
        return x_BLD

    def _condition(self, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, ...]:
        """Return the tensors that condition blocks and output layer, besides the residual stream."""
        assert labels_B is None, "this kind of denoiser has no labels"
        return ()

    def _align(self, h_BLD: Tensor, positions_BL: Tensor | None, clean_BLD: Tensor | None = None) -> Tensor:
        """Move each hidden state to the position that it predicts; `clean_BLD` are those of the clean copy.

        `positions_BL` are those of packed documents.
        """
        return h_BLD

    def _head_tensors(self) -> tuple[Tensor, Tensor]:
        weight_VD, bias_V = self.head()
        return weight_VD, weight_VD.new_zeros(len(weight_VD)) if bias_V is None else bias_V

    def _masks(self, state: State) -> Masks:
        """Return the masks of an evaluation's attention; those of a model of blocks hide later blocks."""
        assert state.visible_LL is None or (state.window is None and self.block_length is None)
        if state.window is not None:
            return masks_of_window(state.window, self.block_length, state.packing)
        if self.block_length is None:
            return masks_of(state.packing, self.config.attention, state.visible_LL)
        length, device, copies = state.z_BL.shape[1], state.z_BL.device, 1 if state.clean_BL is None else 2
        arguments = length, self.block_length, state.packing, device, self.config.attention
        if state.packing is not None:
            return masks_of_blocks(*arguments, copies=copies)
        last, masks = self._last_masks
        if last != (copies, *arguments):  # those of all batches of one shape are the same
            masks = masks_of_blocks(*arguments, copies=copies)
            self._last_masks = (copies, *arguments), masks
        return masks

    def _rotary(self, length: int, packing: Packing | None, window: Window | None = None) -> Tensor:
        """Return the rows of the rotary table for the positions of a batch, or of this rank's slice."""
        if window is not None and packing is not None:
            return window.cut(self.rotary_emb(window.cache.length, packing))
        if window is not None:
            table = self.rotary_emb(window.cache.length)
            if window.start is not None:
                return table[window.start : window.start + window.width]
            return table[window.columns_BW]
        if self.context is None:
            return self.rotary_emb(length, packing)
        start = length * self.context.get_local_rank()
        return self.rotary_emb(length * self.context.size())[start : start + length]

    def _head_input(self, h_BLD: Tensor) -> Tensor:
        if self.config.head_precision == "float32" or not torch.is_autocast_enabled(h_BLD.device.type):
            return h_BLD.to(self.head()[0].dtype)
        return h_BLD.to(torch.get_autocast_dtype(h_BLD.device.type))


def _positions(state: State) -> Tensor | None:
    """Return the position of each evaluated token in its document; None if sequences are not packed."""
    if state.packing is None:
        return None
    positions_BL = state.packing.positions_BL
    return positions_BL if state.window is None else state.window.cut(positions_BL)


def count_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """Count the parameters of the whole, possibly sharded, model; with `trained`, those that need gradients."""
    whole = whole_parameters(model)
    # DeepSpeed stage 3 empties parameters and keeps their size in `ds_numel`.
    counted = [(name, p) for name, p in model.named_parameters() if p.requires_grad or not trained]
    return sum(getattr(p, "ds_numel", whole[name].numel()) for name, p in counted)
