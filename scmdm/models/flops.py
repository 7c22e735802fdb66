"""Floating-point operations of a training step, counted from its matrix products (2 per multiply-add).

Element-wise work, norms, the time condition (one row per sequence) and the conditioner's non-linearity are left out, as
is usual for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scmdm.config.model import ModelConfig
from scmdm.diffusion.schedule import Schedule

# Dense bfloat16 FLOP/s from vendors' data sheets. The first key that the device's name contains applies.
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
# Dense FP8 FLOP/s, likewise; devices that are not listed have none.
PEAK_FP8_FLOPS: dict[str, float] = {
    "B200": 4500e12,
    "H200": 1979e12,
    "H100 PCIe": 1513e12,
    "H100 NVL": 1671e12,
    "H100": 1979e12,
    "L40S": 733e12,
    "RTX 4090": 330e12,
}


@dataclass(frozen=True)
class StepFlops:
    """Operations of a training step."""

    forward: float  # the pass that carries the loss
    backward: float
    estimate_passes: float  # all passes that compute the estimate

    @property
    def loss_pass(self) -> float:
        """Forward and backward pass of the loss."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """All passes."""
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
    block_length: int | None = None,
    shared_layers: int = 0,
) -> StepFlops:
    """Count the operations per sequence of `length` tokens in one training step.

    `passes` is the number of passes that compute the estimate (0: vanilla training). A backward pass counts twice its
    forward pass; the output head counts at masked positions only, averaged over time. With `trained_layers`, only the
    weights of that many last blocks have gradients (adapters are not counted). A model of blocks of `block_length`
    evaluates a noised and a clean copy, of which each position sees its block and those before it. `shared_layers` is
    the number of first blocks that only the pass of the loss runs (`RunConfig.shared_layers`).
    """
    blocks = block_flops(
        config,
        length,
        passes=passes,
        trained_layers=trained_layers,
        block_length=block_length,
        shared_layers=shared_layers,
    )
    masked = length * _mean_masked(schedule)
    mapped = config.self_conditioned and config.mixing == "added"
    maps = 2 if config.conditioner == "mlp" else 1
    conditioner = 2.0 * maps * config.width**2 * length if mapped else 0.0
    pairs = length if block_length is None else length + min(block_length, length)
    attention = 4.0 * length * pairs * config.attention_width
    trunk = blocks.forward + config.layers * attention
    logits = 2.0 * masked * config.width * vocab_size
    # Logits, then probabilities times embeddings; with top-k, the second product becomes a sum of a few rows.
    upper = trunk * (config.layers - shared_layers) / config.layers
    products = 0.0 if config.carried == "hidden" else 2.0 if config.estimate_top_k is None else 1.0
    first = upper + products * logits  # its input is the null estimate
    later = first + conditioner
    estimate = first + (passes - 1) * later if passes else 0.0
    forward = trunk + conditioner + logits
    frozen = 0.0 if trained_layers is None else 2 * blocks.forward - blocks.backward + logits
    frozen += 2 * attention * _untouched_layers(config, trained_layers)
    return StepFlops(forward, 2 * forward - frozen, estimate if stop_gradient else 3 * estimate)


def block_flops(
    config: ModelConfig,
    length: int,
    *,
    passes: int,
    trained_layers: int | None = None,
    block_length: int | None = None,
    shared_layers: int = 0,
) -> StepFlops:
    """Count the part of `step_flops` that is in the products of the blocks' linear maps, with `stop_gradient`."""
    layer = 2.0 * config.block_matrix_elements() * length * (1 if block_length is None else 2)
    forward = config.layers * layer
    frozen = 0.0 if trained_layers is None else (config.layers - trained_layers) * layer
    frozen += layer * _untouched_layers(config, trained_layers)
    return StepFlops(forward, 2 * forward - frozen, passes * (config.layers - shared_layers) * layer)


def _untouched_layers(config: ModelConfig, trained_layers: int | None) -> int:
    """Count the first blocks without a backward pass: nothing is trained there, and the estimate enters after them."""
    if trained_layers is None or config.lora_rank or not config.self_conditioned:
        return 0
    return min(config.inject_layer, config.layers - trained_layers)


def _mean_masked(schedule: Schedule) -> float:
    """Return the fraction of positions that are masked, averaged over time."""
    return float((1 - schedule.alpha(torch.linspace(0, 1, 1001, dtype=torch.float64))).mean())


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 FLOP/s of the device; None for CPUs and for GPUs that `PEAK_FLOPS` does not list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
