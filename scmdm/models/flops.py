"""Floating-point operations of a training step, counted from its matrix products (2 per multiply-add).

Element-wise work, norms, the time condition (one row per sequence) and the conditioner's non-linearity are left out, as
is usual for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scmdm.config.model import ModelConfig
from scmdm.diffusion.schedule import Schedule

# Dense bfloat16 products a second, as vendors state them; the first name that a device's contains counts.
PEAK_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class StepFlops:
    """Operations per sequence of a step."""

    forward: float  # of the pass that carries the loss
    backward: float
    estimate_passes: float  # all passes that make the estimate

    @property
    def loss_pass(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.loss_pass + self.estimate_passes


def step_flops(
    config: ModelConfig,
    vocab_size: int,
    length: int,
    schedule: Schedule,
    *,
    passes: int,
    stop_gradient: bool = True,
    trained_layers: int | None = None,
) -> StepFlops:
    """Of a sequence of `length` tokens; `passes` is the number of passes that make the estimate (0: vanilla).

    A backward pass counts twice its forward pass; the head counts where tokens are masked, on average over time. With
    `trained_layers` the weights of so many blocks alone have a gradient (and adapters, which do not count).
    """
    width, masked = config.width, length * _mean_masked(schedule)
    conditioner = 2.0 * width * width * length if config.self_conditioned else 0.0
    products = 2.0 * _block_matrices(config) * length
    attention = 4.0 * length * length * width
    trunk = config.layers * (products + attention)
    logits = 2.0 * masked * width * vocab_size
    # Logits, then the expected embedding, of a few tokens a sum of rows; its input is the null estimate.
    first = trunk + _estimate_products(config) * logits
    later = first + conditioner
    estimate = first + (passes - 1) * later if passes else 0.0
    forward = trunk + conditioner + logits
    frozen = 0.0 if trained_layers is None else (config.layers - trained_layers) * products + logits
    return StepFlops(forward, 2 * forward - frozen, estimate if stop_gradient else 3 * estimate)


def _estimate_products(config: ModelConfig) -> float:
    """The head's, in those that logits take; without the head's own product with its axes, one for all positions."""
    if config.estimate_top_k is None:
        return 2.0
    return 1.0 if config.estimate_rank is None else min(1.0, config.estimate_rank / config.width)


def _block_matrices(config: ModelConfig) -> int:
    """Elements of a block's matrices that multiply every position."""
    width = config.width
    if config.kind == "llama":
        return width * (2 * width + 2 * config.kv_width + 3 * config.mlp_width)
    return width * (4 * width + 2 * config.mlp_width)


def _mean_masked(schedule: Schedule) -> float:
    return float((1 - schedule.alpha(torch.linspace(0, 1, 1001, dtype=torch.float64))).mean())


def peak_flops(device: torch.device) -> float | None:
    """What the device can do at most, or None for one that we have no figure of (all CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
