"""A training step with the work of MDLM's published code (github.com/kuleshov-group/mdlm), in plain PyTorch.

What it does in each step is what that code does: an embedding by indexing, norms and modulation as separate operations,
rotary positions on queries and keys, logits at all positions, a check of them for NaN, SUBS in place on (B, L, V) and
by indexing at unmasked positions, a log-softmax, a gathered loss, AdamW as torch makes it by default, a clipped
gradient, an average that makes two temporary tensors for each parameter, the loss as a Python number and a float64
metric. Attention is torch's fused kernel in place of flash-attn, which needs a GPU. Nothing is dropped out. In float32
its autocast contexts do nothing on a CPU.

Legend: B batch, L length, D width, C width of the time condition, V vocabulary with the mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmdm.models.dit import DiTConfig

_FREQUENCIES = 256
_MINUS_INFINITY = -1e6
_T_MIN = 1e-3


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.layer_norm(x_BLD.float(), x_BLD.shape[-1:]) * self.weight


def _modulated(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return x_BLD * (1 + scale_B1D) + shift_B1D


class _Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, inner = config.width, config.inner_width
        self.heads = config.heads
        self.norm1, self.norm2 = _Norm(width), _Norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.modulation = nn.Linear(config.condition_width, 6 * width)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, c_BC: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BC)[:, None].chunk(6, dim=2)
        qkv = self.qkv(_modulated(self.norm1(x_BLD), shift1, scale1))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x_BLD = x_BLD + gate1 * self.out(h.transpose(1, 2).flatten(2))
        return x_BLD + gate2 * self.mlp(_modulated(self.norm2(x_BLD), shift2, scale2))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class PublishedDiT(nn.Module):
    """The network of the published code."""

    def __init__(self, config: DiTConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(vocab_size, config.width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))
        condition = config.condition_width
        self.time = nn.Sequential(nn.Linear(_FREQUENCIES, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm, self.head = _Norm(config.width), nn.Linear(config.width, vocab_size)
        self.modulation = nn.Linear(condition, 2 * config.width)

    def forward(self, z_BL: Tensor, sigma_B: Tensor) -> Tensor:
        """Return logits (B, L, V)."""
        x_BLD = self.embedding[z_BL]
        half = _FREQUENCIES // 2
        angles = sigma_B[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        c_BC = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)))
        pairs = self.config.head_dim // 2
        turns = torch.arange(z_BL.shape[1])[:, None] * 10_000 ** -(torch.arange(pairs) / pairs)
        cos, sin = turns.cos()[:, None], turns.sin()[:, None]
        for block in self.blocks:
            x_BLD = block(x_BLD, cos, sin, c_BC)
        shift, scale = self.modulation(c_BC)[:, None].chunk(2, dim=2)
        logits: Tensor = self.head(_modulated(self.norm(x_BLD), shift, scale))
        return logits


def log_probabilities(logits_BLV: Tensor, z_BL: Tensor, mask_id: int) -> Tensor:
    """Apply SUBS to logits, which are overwritten at the mask's column."""
    logits_BLV[:, :, mask_id] += _MINUS_INFINITY
    log_p_BLV = logits_BLV - torch.logsumexp(logits_BLV, dim=-1, keepdim=True)
    given_BL = z_BL != mask_id
    log_p_BLV[given_BL] = _MINUS_INFINITY
    log_p_BLV[given_BL, z_BL[given_BL]] = 0
    return log_p_BLV


def loss_of(model: PublishedDiT, x_BL: Tensor, z_BL: Tensor, t_B: Tensor, mask_id: int) -> Tensor:
    """Return the terms (B, L) of the NELBO with the log-linear schedule."""
    log_p_BLV = log_probabilities(model(z_BL, torch.zeros_like(t_B)), z_BL, mask_id)
    if torch.isnan(log_p_BLV).any():
        raise FloatingPointError("NaN in the logits")
    return -log_p_BLV.gather(2, x_BL[..., None]).squeeze(2) / t_B[:, None]


def make_published_step(
    config: DiTConfig, vocab_size: int, x_BL: Tensor, *, lr: float = 3e-4, decay: float = 0.9999
) -> Callable[[], float]:
    """Return a function that runs one step on the sequences (B, L), whose last id of the vocabulary is the mask."""
    model, mask_id = PublishedDiT(config, vocab_size).train(), vocab_size - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    averages, valid_BL = [parameter.detach().clone() for parameter in model.parameters()], torch.ones(x_BL.shape)
    metric, updates = torch.zeros(2, dtype=torch.float64), itertools.count(1)

    def step() -> float:
        rows = len(x_BL)
        t_B = (1 - _T_MIN) * ((torch.rand(rows) / rows + torch.arange(rows) / rows) % 1) + _T_MIN
        z_BL = torch.where(torch.rand(x_BL.shape) < t_B[:, None], mask_id, x_BL)
        terms_BL = loss_of(model, x_BL, z_BL, t_B, mask_id) * valid_BL
        loss = terms_BL.sum() / valid_BL.sum()
        metric.add_(torch.stack([terms_BL.detach().double().sum(), valid_BL.double().sum()]))
        value = loss.item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        number = next(updates)
        kept = min(decay, (1 + number) / (10 + number))
        with torch.no_grad():
            for average, parameter in zip(averages, model.parameters(), strict=True):
                average.sub_((1 - kept) * (average - parameter))
        return value

    return step
