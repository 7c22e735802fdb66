"""MDLM's diffusion transformer (arXiv 2406.07524): rotary positions, adaptive layer norm, bidirectional attention.

Modules are named as in the published checkpoints, so that their weights map one to one (`scmdm.model.weights`).

Legend: B batch, L length, D width, H heads, K width of a head, C width of the time condition, V vocabulary with the
mask, N masked positions, R 1 or B.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.schema import ModelConfig
from scmdm.diffusion.packing import Packing
from scmdm.diffusion.schedule import Schedule
from scmdm.model.attention import attend, attend_slices
from scmdm.model.conditioner import Conditioner
from scmdm.model.head import expected_embedding, subs_bias, subs_logits, weighted_nll_sum
from scmdm.model.init import ZeroLinear
from scmdm.model.recompute import run_block

_FREQUENCIES = 256
_SMALLEST_ALPHA = 1e-3  # MDLM's smallest alpha_t: bounds the noise level -log(alpha_t) that the network sees


def modulate(x_BLD: Tensor, shift_R1D: Tensor, scale_R1D: Tensor) -> Tensor:
    return x_BLD * (1 + scale_R1D) + shift_R1D


class LayerNorm(nn.Module):
    """Layer norm in float32 with a gain and no bias."""

    starts_at = 1.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float())


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the noise level through a two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma_R: Tensor) -> Tensor:
        half = _FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma_R.device)
        angles = sigma_R[:, None].float() * torch.exp(-math.log(10_000) * steps / half)[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Rotary(nn.Module):
    """Cosine and sine tables (L, K/2) of rotary positions (half-split layout, base 10,000)."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.empty(head_width // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the table; also after `to_empty` on a meta device."""
        exponent = torch.arange(0, self.head_width, 2, dtype=torch.float32) / self.head_width
        with torch.no_grad():
            self.inv_freq.copy_(1.0 / 10_000**exponent)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device).float(), self.inv_freq.float())
        return angles.cos(), angles.sin()


def rotate(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (k, k + K/2) by its position's angle; the tables are (L, K/2), of packed samples (B, L, K/2)."""
    first, second = x_BLHK.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2).to(x_BLHK.dtype), sin.unsqueeze(-2).to(x_BLHK.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """Attention and a perceptron, each between a modulated norm and a gated residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads, self.attention = config.heads, config.attention
        self.dropout = config.dropout or 0.0
        self.context: DeviceMesh | None = None
        self.norm1 = LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.adaLN_modulation = ZeroLinear(config.condition_width, 6 * width)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: tuple[Tensor, Tensor],
        c_RC: Tensor,
        dropout: bool,
        allowed_B1LL: Tensor | None = None,
    ) -> Tensor:
        modulation = self.adaLN_modulation(c_RC)[:, None].chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        h = self._attend(modulate(self.norm1(x_BLD), shift_attn, scale_attn), rotary, allowed_B1LL)
        x_BLD = x_BLD + gate_attn * F.dropout(h, self.dropout, dropout)
        h = self.mlp(modulate(self.norm2(x_BLD), shift_mlp, scale_mlp))
        return x_BLD + gate_mlp * F.dropout(h, self.dropout, dropout)

    def _attend(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor], allowed_B1LL: Tensor | None) -> Tensor:
        q, k, v = self.attn_qkv(x_BLD).unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.context is None:
            out_BLHK = attend(q, k, v, self.attention, allowed_B1LL)
        else:
            out_BLHK = attend_slices(q, k, v, self.attention, self.context)
        return self.attn_out(out_BLHK.flatten(2))


class TokenEmbedding(nn.Module):
    """One row per token id, the mask among them."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class OutputLayer(nn.Module):
    """Modulated norm; its linear map is applied by the head, on masked positions only."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.width)
        self.linear = ZeroLinear(config.width, vocab_size)
        self.adaLN_modulation = ZeroLinear(config.condition_width, 2 * config.width)

    def forward(self, x_BLD: Tensor, c_RC: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_RC)[:, None].chunk(2, dim=2)
        return modulate(self.norm_final(x_BLD), shift, scale)


class DiT(nn.Module):
    """The denoiser: implements `scmdm.diffusion.objective.Denoiser` and `scmdm.diffusion.sampler.SamplingDenoiser`.

    Without `config.self_conditioned` it has no conditioner and is the plain MDM. A new one has no weights to speak of:
    `scmdm.model.init.init_weights`, or those of a file.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, mask_id: int, schedule: Schedule) -> None:
        super().__init__()
        self.config, self.mask_id, self.schedule = config, mask_id, schedule
        self.vocab_embed = TokenEmbedding(vocab_size, config.width)
        self.sigma_map = TimestepEmbedder(config.condition_width)
        self.rotary_emb = Rotary(config.width // config.heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_layer = OutputLayer(config, vocab_size)
        self.conditioner = Conditioner(config.width, config.conditioner) if config.self_conditioned else None
        self.context: DeviceMesh | None = None

    def slice_sequences(self, context: DeviceMesh) -> None:
        """Take slices of sequences from now on, this rank's among those of `context`."""
        for module in (self, *self.blocks):
            module.context = context

    def hidden(
        self,
        z_BL: Tensor,
        t_B: Tensor,
        estimate_BLD: Tensor | None,
        *,
        dropout: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """Final hidden states (B, L, D), ready for the head: one denoiser evaluation."""
        x_BLD = self.vocab_embed(z_BL).float()  # the residual stream, whatever the precision of the weights
        if estimate_BLD is not None:
            assert self.conditioner is not None, "an estimate needs a self-conditioned model"
            if self.config.inject_at == "masked":
                estimate_BLD = estimate_BLD.masked_fill((z_BL != self.mask_id)[..., None], 0)
            x_BLD = x_BLD + self.conditioner(estimate_BLD)
        c_RC = F.silu(self.sigma_map(self._noise_level(t_B)))
        rotary, recompute = self._rotary(z_BL.shape[1], packing), self.config.activation_checkpointing
        more = () if packing is None else (packing.allowed_B1LL,)
        for block in self.blocks:
            x_BLD = run_block(block, recompute, x_BLD, rotary, c_RC, dropout and self.training, *more)
        return self._head_input(self.output_layer(x_BLD, c_RC))

    def estimate(
        self,
        z_BL: Tensor,
        t_B: Tensor,
        estimate_BLD: Tensor | None,
        *,
        dropout: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """See `Denoiser.estimate`."""
        h_BLD = self.hidden(z_BL, t_B, estimate_BLD, dropout=dropout, packing=packing)
        masked = z_BL == self.mask_id
        return self.embed(z_BL).masked_scatter(masked[..., None], self.expected_embedding(h_BLD[masked]))

    def weighted_nll(
        self,
        z_BL: Tensor,
        t_B: Tensor,
        estimate_BLD: Tensor | None,
        x_BL: Tensor,
        weight_BL: Tensor,
        *,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Denoiser.weighted_nll`."""
        h_BLD = self.hidden(z_BL, t_B, estimate_BLD, dropout=True, packing=packing)
        masked = z_BL == self.mask_id
        linear = self.output_layer.linear
        total, nll_N = weighted_nll_sum(
            h_BLD[masked],
            linear.weight,
            linear.bias,
            x_BL[masked],
            weight_BL[masked],
            mask_id=self.mask_id,
            chunk=self.config.head_chunk,
        )
        return total, weight_BL.new_zeros(z_BL.shape).masked_scatter(masked, nll_N)

    def logits(self, h_ND: Tensor) -> Tensor:
        """SUBS logits (N, V) float32 of selected hidden states."""
        linear = self.output_layer.linear
        with torch.autocast(h_ND.device.type, enabled=False):
            return subs_logits(h_ND, linear.weight, subs_bias(linear.bias, self.mask_id))

    def expected_embedding(self, h_ND: Tensor) -> Tensor:
        """Expected embedding (N, D) of the predicted token at selected hidden states."""
        linear = self.output_layer.linear
        return expected_embedding(
            h_ND,
            linear.weight,
            linear.bias,
            self.vocab_embed.embedding,
            mask_id=self.mask_id,
            chunk=self.config.head_chunk,
            top_k=self.config.estimate_top_k,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding of tokens, any shape in front."""
        return self.vocab_embed(ids)

    def _rotary(self, length: int, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """The tables' rows for the positions at hand."""
        if packing is not None:
            cos, sin = self.rotary_emb(length)
            return cos[packing.positions_BL], sin[packing.positions_BL]
        if self.context is None:
            return self.rotary_emb(length)
        cos, sin = self.rotary_emb(length * self.context.size())
        at = slice(length * self.context.get_local_rank(), length * (self.context.get_local_rank() + 1))
        return cos[at], sin[at]

    def _noise_level(self, t_B: Tensor) -> Tensor:
        if not self.config.time_conditioning:
            return torch.zeros(1, device=t_B.device)
        return -self.schedule.alpha(t_B).clamp(min=_SMALLEST_ALPHA).log().float()

    def _head_input(self, h_BLD: Tensor) -> Tensor:
        if self.config.head_precision == "float32" or not torch.is_autocast_enabled(h_BLD.device.type):
            return h_BLD.to(self.output_layer.linear.weight.dtype)
        return h_BLD.to(torch.get_autocast_dtype(h_BLD.device.type))


def count_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """Number of parameters, or of those that are trained, of the whole model also where an engine has sharded it."""
    # DeepSpeed's stage 3 empties a parameter and keeps its size beside it.
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained)
