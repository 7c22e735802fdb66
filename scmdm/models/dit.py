"""MDLM's diffusion transformer (arXiv 2406.07524): rotary positions, adaptive layer norm, bidirectional attention.

Modules are named as in the published checkpoints, whose weights map one to one (`scmdm.convert`).

Legend: B batch, L length, D width, H heads, K width of a head, C width of the time condition, V vocabulary with the
mask, R rows of the condition: B, or 1 if all sequences share it, I and O inputs and outputs of a linear map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.fields import key
from scmdm.config.model import ModelConfig
from scmdm.diffusion.schedule import Schedule, noise_level
from scmdm.diffusion.state import NO_LABEL
from scmdm.models.activation_checkpointing import in_float32
from scmdm.models.attention import NO_MASKS, Masks
from scmdm.models.conditioner import make_conditioner
from scmdm.models.initialization import ZeroLinear
from scmdm.models.linear import Linear, linear_gelu
from scmdm.models.network import Network, TokenEmbedding
from scmdm.models.rotary import Rotary, attend_rotated

_FREQUENCIES = 256


@dataclass
class DiTConfig(ModelConfig):
    """Keys of `model.kind=dit`."""

    condition_width: int = key(32, at_least=1, at_most=65536, help="width of the time condition")
    time_conditioning: bool = key(False, help="condition the network on the noise level")
    labels: bool = key(False, help="condition the network on labels of samples, for guidance")

    def block_matrix_elements(self) -> int:
        """Count the elements of the projections of attention and of the two maps of the MLP."""
        return self.width * (4 * self.attention_width + 2 * self.inner_width)


class ModulatedLayerNorm(nn.Module):
    """Layer norm in float32 with a gain and no bias, followed by `x (1 + scale) + shift`."""

    starts_at = 1.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x_BLD: Tensor, shift_R1D: Tensor, scale_R1D: Tensor) -> Tensor:
        """Normalise the last dimension; the result is float32."""
        return in_float32(self._normalise, x_BLD, shift_R1D, scale_R1D)

    def _normalise(self, x_BLD: Tensor, shift_R1D: Tensor, scale_R1D: Tensor) -> Tensor:
        x_BLD, width, gain_D = x_BLD.float(), x_BLD.shape[-1:], self.weight.float()
        if len(shift_R1D) > 1:
            return F.layer_norm(x_BLD, width, gain_D) * (1 + scale_R1D) + shift_R1D
        # A modulation that all sequences share folds into the gain and bias of one kernel.
        return F.layer_norm(x_BLD, width, gain_D * (1 + scale_R1D.flatten()), shift_R1D.flatten().float())


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the noise level, mapped by an MLP of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma_R: Tensor) -> Tensor:
        """Embed noise levels, (R, C)."""
        half = _FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigma_R.device)
        angles = sigma_R[:, None].float() * torch.exp(-math.log(10_000) * steps / half)[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """Embedding of labels; the last row is for sequences without a label."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels_R: Tensor) -> Tensor:
        """Embed labels, (R, C)."""
        last = self.embedding_table.num_embeddings - 1
        return self.embedding_table(torch.where(labels_R == NO_LABEL, last, labels_R))


class DiTBlock(nn.Module):
    """Attention and an MLP, each after a modulated norm and added to the residual stream through a gate."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.attention = config.heads, config.attention
        self.dropout = config.dropout or 0.0
        self.context: DeviceMesh | None = None
        self.norm1 = ModulatedLayerNorm(width)
        self.attn_qkv = Linear(width, 3 * config.attention_width, bias=False)
        self.attn_out = Linear(config.attention_width, width, bias=False)
        self.norm2 = ModulatedLayerNorm(width)
        # The GELU at index 1 is applied by `linear_gelu`; it keeps the names of published weights.
        self.mlp = nn.Sequential(
            Linear(width, config.inner_width), nn.GELU(approximate="tanh"), Linear(config.inner_width, width)
        )
        self.adaLN_modulation = ZeroLinear(config.condition_width, 6 * width)

    def forward(self, x_BLD: Tensor, rotary: Tensor, c_RC: Tensor, dropout: bool, masks: Masks = NO_MASKS) -> Tensor:
        """Return the residual stream (B, L, D) after the block. `rotary`: table of `Rotary`; `masks`: `masks_of`."""
        modulation = self.adaLN_modulation(c_RC)[:, None].chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        h = self._attend(self.norm1(x_BLD, shift_attn, scale_attn), rotary, masks)
        x_BLD = x_BLD + F.dropout(gated_linear(self.attn_out, h, gate_attn), self.dropout, dropout)
        up, _gelu, down = self.mlp
        h = linear_gelu(up, self.norm2(x_BLD, shift_mlp, scale_mlp))
        return x_BLD + F.dropout(gated_linear(down, h, gate_mlp), self.dropout, dropout)

    def _attend(self, x_BLD: Tensor, rotary: Tensor, masks: Masks) -> Tensor:
        q, k, v = self.attn_qkv(x_BLD).unflatten(2, (3, self.heads, -1)).unbind(2)
        out_BLHK = attend_rotated(q, k, v, rotary, self.attention, masks, self.context, repeated=self.training)
        return out_BLHK.flatten(2)


def gated_linear(linear: nn.Module, x_BLI: Tensor, gate_R1O: Tensor) -> Tensor:
    """Return `gate * linear(x)`, (B, L, O).

    The backward pass keeps what the gate multiplies. A gate that all sequences share is multiplied with the weights
    (O, I) if they have fewer elements than the result, or if no gradient is needed.
    """
    foldable = len(gate_R1O) == 1 and isinstance(linear, Linear)  # peft wraps linear maps in its own modules
    if not foldable or (torch.is_grad_enabled() and x_BLI.shape[:-1].numel() < x_BLI.shape[-1]):
        return gate_R1O * linear(x_BLI)
    y_BLO: Tensor = linear(x_BLI, gate_R1O.flatten())
    return y_BLO


class DiTOutput(nn.Module):
    """Final modulated norm, and weight and bias of the output head, which `Network` applies."""

    def __init__(self, config: DiTConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = ModulatedLayerNorm(config.width)
        self.linear = ZeroLinear(config.width, vocab_size)
        self.adaLN_modulation = ZeroLinear(config.condition_width, 2 * config.width)

    def forward(self, x_BLD: Tensor, c_RC: Tensor) -> Tensor:
        """Return normalised hidden states (B, L, D), float32."""
        shift, scale = self.adaLN_modulation(c_RC)[:, None].chunk(2, dim=2)
        return self.norm_final(x_BLD, shift, scale)


class DiT(Network):
    """MDLM's denoiser. `classes` is the number of labels, with `config.labels`."""

    Config = DiTConfig
    config: DiTConfig

    def __init__(
        self, config: DiTConfig, *, vocab_size: int, mask_id: int, schedule: Schedule, classes: int = 0
    ) -> None:
        super().__init__(config, mask_id=mask_id, schedule=schedule)
        self.vocab_embed = TokenEmbedding(vocab_size, config.width)
        self.sigma_map = TimestepEmbedder(config.condition_width)
        self.cond_map = LabelEmbedder(classes, config.condition_width) if config.labels else None
        self.rotary_emb = Rotary(config.head_dim)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.layers))
        self.output_layer = DiTOutput(config, vocab_size)
        self.conditioner = make_conditioner(config)

    def _condition(self, t_B: Tensor, labels_B: Tensor | None) -> tuple[Tensor, ...]:
        c_RC = F.silu(self.sigma_map(self._noise_level(t_B)))
        if self.cond_map is None:
            assert labels_B is None, "the model has no labels (model.labels=false)"
            return (c_RC,)
        labels = torch.full((1,), NO_LABEL, device=t_B.device) if labels_B is None else labels_B
        return (c_RC + F.silu(self.cond_map(labels)),)

    def _noise_level(self, t_B: Tensor) -> Tensor:
        if not self.config.time_conditioning:
            return torch.zeros(1, device=t_B.device)
        return noise_level(self.schedule, t_B).float()
