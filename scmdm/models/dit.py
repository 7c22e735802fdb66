"""MDLM's diffusion transformer (arXiv 2406.07524): rotary positions, adaptive layer norm, bidirectional attention.

Modules are named as in the published checkpoints, so that their weights map one to one (`scmdm.convert`).

Legend: B batch, L length, D width, H heads, K width of a head, C width of the time condition, V vocabulary with the
mask, N masked positions, R 1 or B.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.model import ModelConfig
from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import NO_LABEL, State
from scmdm.models.attention import NO_MASKS, Masks
from scmdm.models.conditioner import Conditioner
from scmdm.models.initialization import ZeroLinear
from scmdm.models.linear import Linear
from scmdm.models.network import Network, TokenEmbedding
from scmdm.models.rotary import Rotary, attend_rotated
from scmdm.ops.gelu import Gelu, gelu_of

_FREQUENCIES = 256
_SMALLEST_ALPHA = 1e-3  # MDLM's smallest alpha_t: bounds the noise level -log(alpha_t) that the network sees


class LayerNorm(nn.Module):
    """Layer norm in float32 with a gain and no bias, then `x (1 + scale) + shift`."""

    starts_at = 1.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_BLD: Tensor, shift_R1D: Tensor, scale_R1D: Tensor) -> Tensor:
        x_BLD, width, gain_D = x_BLD.float(), x_BLD.shape[-1:], self.weight.float()
        if len(shift_R1D) > 1:
            return F.layer_norm(x_BLD, width, gain_D) * (1 + scale_R1D) + shift_R1D
        # What all rows share is the norm's own gain and bias, whose gradients its kernels make.
        return F.layer_norm(x_BLD, width, gain_D * (1 + scale_R1D.flatten()), shift_R1D.flatten().float())


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


class LabelEmbedder(nn.Module):
    """One row per class, and a last one for sequences without a label."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels_R: Tensor) -> Tensor:
        last = self.embedding_table.num_embeddings - 1
        return self.embedding_table(torch.where(labels_R == NO_LABEL, last, labels_R))


class Block(nn.Module):
    """Attention and a perceptron, each between a modulated norm and a gated residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads, self.attention = config.heads, config.attention
        self.dropout = config.dropout or 0.0
        self.context: DeviceMesh | None = None
        self.norm1 = LayerNorm(width)
        self.attn_qkv = Linear(width, 3 * width, bias=False)
        self.attn_out = Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width)
        self.mlp = nn.Sequential(Linear(width, hidden), Gelu(), Linear(hidden, width))
        self.adaLN_modulation = ZeroLinear(config.condition_width, 6 * width)

    def forward(
        self,
        x_BLD: Tensor,
        rotary: Tensor,
        c_RC: Tensor,
        dropout: bool,
        masks: Masks = NO_MASKS,
        at_N: Tensor | None = None,
    ) -> Tensor:
        """`at_N` goes on with these positions (1, N, D) after attention, where all rows share the modulation."""
        modulation = self.adaLN_modulation(c_RC)[:, None].chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        h = self._attend(self.norm1(x_BLD, shift_attn, scale_attn), rotary, masks)
        if at_N is not None:
            assert len(c_RC) == 1
            x_BLD, h = (y.flatten(0, 1).index_select(0, at_N)[None] for y in (x_BLD, h))
        x_BLD = x_BLD + F.dropout(gated(self.attn_out, h, gate_attn), self.dropout, dropout)
        up, gelu, down = self.mlp
        h = gelu_of(up, gelu, self.norm2(x_BLD, shift_mlp, scale_mlp))
        return x_BLD + F.dropout(gated(down, h, gate_mlp), self.dropout, dropout)

    def _attend(self, x_BLD: Tensor, rotary: Tensor, masks: Masks) -> Tensor:
        q, k, v = self.attn_qkv(x_BLD).unflatten(2, (3, self.heads, -1)).unbind(2)
        out_BLHK = attend_rotated(q, k, v, rotary, self.attention, masks, self.context, repeated=self.training)
        return out_BLHK.flatten(2)


def gated(linear: nn.Module, x_BLI: Tensor, gate_R1O: Tensor) -> Tensor:
    """`gate * linear(x)` (B, L, O). A backward pass needs what the gate multiplies: weights (O, I), or results, where
    those are fewer."""
    folds = len(gate_R1O) == 1 and isinstance(linear, Linear)  # peft puts modules of its own around ours
    if not folds or (torch.is_grad_enabled() and x_BLI.shape[:-1].numel() < x_BLI.shape[-1]):
        return gate_R1O * linear(x_BLI)
    y_BLO: Tensor = linear(x_BLI, gate_R1O.flatten())
    return y_BLO


class OutputLayer(nn.Module):
    """Modulated norm; its linear map is applied by the head, on masked positions only."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.width)
        self.linear = ZeroLinear(config.width, vocab_size)
        self.adaLN_modulation = ZeroLinear(config.condition_width, 2 * config.width)

    def forward(self, x_BLD: Tensor, c_RC: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_RC)[:, None].chunk(2, dim=2)
        return self.norm_final(x_BLD, shift, scale)


class DiT(Network):
    """MDLM's denoiser."""

    def __init__(
        self, config: ModelConfig, *, vocab_size: int, mask_id: int, schedule: Schedule, classes: int = 0
    ) -> None:
        super().__init__(config, mask_id=mask_id, schedule=schedule)
        self.vocab_embed = TokenEmbedding(vocab_size, config.width)
        self.sigma_map = TimestepEmbedder(config.condition_width)
        self.cond_map = LabelEmbedder(classes, config.condition_width) if config.labels else None
        self.rotary_emb = Rotary(config.head_width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_layer = OutputLayer(config, vocab_size)
        self.conditioner = Conditioner(config.width, config.conditioner) if config.self_conditioned else None

    def _condition(self, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, ...]:
        c_RC = F.silu(self.sigma_map(self._noise_level(t_B)))
        if self.cond_map is None:
            assert labels_B is None, "a model that was not trained with labels"
            return (c_RC,)
        labels = torch.full((1,), NO_LABEL, device=t_B.device) if labels_B is None else labels_B
        return (c_RC + F.silu(self.cond_map(labels)),)

    def _ends_by_rows(self, state: State) -> bool:
        # A compiled block would be compiled anew for every number of positions.
        return state.labels_B is None and not (self.config.time_conditioning or self.config.compile)

    def _noise_level(self, t_B: Tensor) -> Tensor:
        if not self.config.time_conditioning:
            return torch.zeros(1, device=t_B.device)
        return -self.schedule.alpha(t_B).clamp(min=_SMALLEST_ALPHA).log().float()
