"""A LLaMA-like transformer without a causal mask, as LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487) are.

RMS norms, rotary positions, grouped-query attention, gated perceptron (SwiGLU), no time condition. It computes what
the same layers of `transformers` compute; `scmdm.convert` maps the names.

Legend: B batch, L length, D width, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.model import ModelConfig
from scmdm.diffusion.packing import Packing
from scmdm.diffusion.schedule import Schedule
from scmdm.models.attention import NO_MASKS, Masks
from scmdm.models.conditioner import Conditioner
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
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class Block(nn.Module):
    """Attention and a gated perceptron, each between a norm and a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, own = config.width, config.llama
        self.head_width, self.attention = config.head_width, config.attention
        self.dropout = config.dropout or 0.0
        self.context: DeviceMesh | None = None
        self.norm1 = RMSNorm(width, own.norm_eps)
        self.attn_q = Linear(width, width, bias=own.attention_bias)
        self.attn_k = Linear(width, config.kv_width, bias=own.attention_bias)
        self.attn_v = Linear(width, config.kv_width, bias=own.attention_bias)
        self.attn_out = Linear(width, width, bias=False)
        self.norm2 = RMSNorm(width, own.norm_eps)
        self.mlp_gate = Linear(width, config.mlp_width, bias=False)
        self.mlp_up = Linear(width, config.mlp_width, bias=False)
        self.mlp_down = Linear(config.mlp_width, width, bias=False)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: Tensor,
        dropout: bool,
        masks: Masks = NO_MASKS,
    ) -> Tensor:
        h_BLD = self._attend(self.norm1(x_BLD), rotary, masks)
        x_BLD = x_BLD + F.dropout(h_BLD, self.dropout, dropout)
        h_BLD = self.norm2(x_BLD)
        h_BLI = F.silu(self.mlp_gate(h_BLD)) * self.mlp_up(h_BLD)
        return x_BLD + F.dropout(self.mlp_down(h_BLI), self.dropout, dropout)

    def _attend(self, h_BLD: Tensor, rotary: Tensor, masks: Masks) -> Tensor:
        maps = (self.attn_q, self.attn_k, self.attn_v)
        q, k, v = (linear(h_BLD).unflatten(2, (-1, self.head_width)) for linear in maps)
        out_BLHK = attend_rotated(q, k, v, rotary, self.attention, masks, self.context, repeated=self.training)
        return self.attn_out(out_BLHK.flatten(2))


class OutputLayer(nn.Module):
    """Norm; the linear map (None: tied to the embedding) is applied by the head, on masked positions only."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(config.width, config.llama.norm_eps)
        self.linear = None if config.llama.tied else nn.Linear(config.width, vocab_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.norm_final(x_BLD)


class Llama(Network):
    """The denoiser of LLaDA and Dream."""

    def __init__(self, config: ModelConfig, *, vocab_size: int, mask_id: int, schedule: Schedule) -> None:
        super().__init__(config, mask_id=mask_id, schedule=schedule)
        self.vocab_embed = TokenEmbedding(vocab_size, config.width)
        self.rotary_emb = Rotary(config.head_width, config.llama.rotary_base)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_layer = OutputLayer(config, vocab_size)
        self.conditioner = Conditioner(config.width, config.conditioner) if config.self_conditioned else None

    def _align(self, h_BLD: Tensor, packing: Packing | None) -> Tensor:
        """With `logit_shift` a position is predicted from the one before it, the first of a document from itself."""
        if not self.config.llama.logit_shift:
            return h_BLD
        assert self.context is None, "the state before a slice is on another rank"
        shifted_BLD = torch.cat([h_BLD[:, :1], h_BLD[:, :-1]], dim=1)
        if packing is None:
            return shifted_BLD
        return torch.where((packing.positions_BL == 0)[..., None], h_BLD, shifted_BLD)
