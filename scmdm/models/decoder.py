"""A LLaMA-style transformer without a causal mask, as in LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487).

RMS norms, rotary positions, grouped-query attention, a gated MLP (SwiGLU), no time condition. Layer by layer it
computes what LLaMA, Mistral, Qwen2, Qwen3 and Granite in `transformers` compute; `scmdm.convert.families.decoders`
maps their configurations and the names of their weights.

Blocks may have a mixture of experts in place of the gated MLP, as in LLaDA-MoE and LLaDA2 (`scmdm.models.experts`).

Legend: B batch, L length, D width, H heads, G heads of keys and values, K width of a head, I width of the MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.diffusion.schedule import Schedule
from scmdm.models.activation_checkpointing import in_float32
from scmdm.models.attention import NO_MASKS, Masks
from scmdm.models.conditioner import make_conditioner
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.experts.expert_block import ExpertMixture
from scmdm.models.experts.router import Router
from scmdm.models.linear import Linear
from scmdm.models.network import Network, TokenEmbedding
from scmdm.models.rotary import Rotary, attend_rotated


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 with a gain (arXiv 1910.07467)."""

    starts_at = 1.0

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result is float32."""
        return in_float32(self._normalise, x)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class DecoderBlock(nn.Module):
    """Grouped-query attention and a gated MLP or experts, each after an RMS norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, number: int = 0) -> None:
        super().__init__()
        width, bias = config.width, config.attention_bias
        self.head_dim, self.attention = config.head_dim, config.attention
        self.dropout = config.dropout or 0.0
        self.query_multiplier, self.residual_multiplier = config.query_multiplier, config.residual_multiplier
        self.context: DeviceMesh | None = None
        self.norm1 = RMSNorm(width, config.norm_eps)
        self.attn_q = Linear(width, config.attention_width, bias=bias)
        self.attn_k = Linear(width, config.kv_width, bias=bias)
        self.attn_v = Linear(width, config.kv_width, bias=bias)
        self.norm_q = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.norm_k = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.attn_out = Linear(config.attention_width, width, bias=config.output_bias)
        self.norm2 = RMSNorm(width, config.norm_eps)
        self.experts = None
        if config.experts and number >= config.dense_layers:
            self.experts = expert_mixture(config)
            return
        self.mlp_gate = Linear(width, config.inner_width, bias=config.mlp_bias)
        self.mlp_up = Linear(width, config.inner_width, bias=config.mlp_bias)
        self.mlp_down = Linear(config.inner_width, width, bias=config.mlp_bias)

    def forward(self, x_BLD: Tensor, rotary: Tensor, dropout: bool, masks: Masks = NO_MASKS) -> Tensor:
        """Return the residual stream (B, L, D) after the block. `rotary`: table of `Rotary`; `masks`: `masks_of`."""
        h_BLD = self._attend(self.norm1(x_BLD), rotary, masks)
        x_BLD = x_BLD + self._scaled(F.dropout(h_BLD, self.dropout, dropout))
        h_BLD = self.norm2(x_BLD)
        h_BLD = self._gated_mlp(h_BLD) if self.experts is None else self.experts(h_BLD)
        return x_BLD + self._scaled(F.dropout(h_BLD, self.dropout, dropout))

    def _gated_mlp(self, h_BLD: Tensor) -> Tensor:
        mapped: Tensor = self.mlp_down(F.silu(self.mlp_gate(h_BLD)) * self.mlp_up(h_BLD))
        return mapped

    def _scaled(self, h_BLD: Tensor) -> Tensor:
        return h_BLD if self.residual_multiplier == 1 else self.residual_multiplier * h_BLD

    def _attend(self, h_BLD: Tensor, rotary: Tensor, masks: Masks) -> Tensor:
        projections = (self.attn_q, self.attn_k, self.attn_v)
        q, k, v = (projection(h_BLD).unflatten(2, (-1, self.head_dim)) for projection in projections)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if self.query_multiplier != 1:
            q = self.query_multiplier * q
        out_BLHK = attend_rotated(q, k, v, rotary, self.attention, masks, self.context, repeated=self.training)
        return self.attn_out(out_BLHK.flatten(2))


def expert_mixture(config: DecoderConfig) -> ExpertMixture:
    """Make the experts of a block."""
    router = Router(
        config.width,
        config.experts,
        config.experts_per_token,
        sigmoid=config.router == "sigmoid",
        groups=config.router_groups,
        top_groups=config.router_top_groups,
        scale=config.router_scale,
        renormalise=config.router_renormalise,
        balanced=config.router_bias,
    )
    inner = config.expert_inner_width
    return ExpertMixture(router, width=config.width, expert_width=inner, shared_width=config.shared_experts * inner)


class DecoderOutput(nn.Module):
    """Final norm and, unless the embedding is tied, the output head's weight, which `Network` applies."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(config.width, config.norm_eps)
        self.divisor = config.logits_divisor
        self.linear = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return normalised hidden states (B, L, D), float32, divided by the divisor of the logits."""
        h_BLD = self.norm_final(x_BLD)
        return h_BLD if self.divisor == 1 else h_BLD / self.divisor


class Decoder(Network):
    """Denoiser of LLaDA, Dream and models converted from LLaMA, Mistral, Qwen and Granite."""

    Config = DecoderConfig
    config: DecoderConfig

    def __init__(
        self, config: DecoderConfig, *, vocab_size: int, mask_id: int, schedule: Schedule, classes: int = 0
    ) -> None:
        assert not classes, "this kind of denoiser has no labels"
        super().__init__(config, mask_id=mask_id, schedule=schedule)
        self.vocab_embed = TokenEmbedding(vocab_size, config.width)
        self.rotary_emb = Rotary(config.rotated_width, config.rotary_base, config.scaling)
        self.blocks = nn.ModuleList(DecoderBlock(config, number) for number in range(config.layers))
        self.output_layer = DecoderOutput(config, vocab_size)
        self.conditioner = make_conditioner(config)

    def _scaled(self, x_BLD: Tensor) -> Tensor:
        """Multiply by `embedding_multiplier`."""
        return x_BLD if self.config.embedding_multiplier == 1 else self.config.embedding_multiplier * x_BLD

    def _align(self, h_BLD: Tensor, positions_BL: Tensor | None, clean_BLD: Tensor | None = None) -> Tensor:
        """Shift hidden states by one position if `logit_shift`; the first of a document predicts itself.

        The first position of a later block is predicted from the clean copy of the block before it.
        """
        if not self.config.logit_shift:
            return h_BLD
        assert self.context is None, "the hidden state before a slice is on another rank"
        shifted_BLD = torch.cat([h_BLD[:, :1], h_BLD[:, :-1]], dim=1)
        if clean_BLD is not None and self.block_length is not None:
            before_BLD = torch.cat([h_BLD[:, :1], clean_BLD[:, :-1]], dim=1)
            at_L = torch.arange(h_BLD.shape[1], device=h_BLD.device)
            positions = at_L if positions_BL is None else positions_BL
            shifted_BLD = torch.where((positions % self.block_length == 0)[..., None], before_BLD, shifted_BLD)
        if positions_BL is None:
            return shifted_BLD
        return torch.where((positions_BL == 0)[..., None], h_BLD, shifted_BLD)
