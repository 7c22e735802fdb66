"""Parameter groups, the optimizer and its rate over time."""

from __future__ import annotations

import math

import torch
from torch import nn

from scmdm.config.training import OptimizerConfig, ScheduleConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """What is trained: matrices (decayed) and the rest (norms, biases, embeddings), apart for trunk and conditioner."""
    conditioner_lr = config.lr if config.conditioner_lr is None else config.conditioner_lr
    groups = []
    for name, peak_lr, in_conditioner in (("trunk", config.lr, False), ("conditioner", conditioner_lr, True)):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        chosen = [(n, p) for n, p in trained if n.startswith("conditioner.") == in_conditioner]
        for decayed in (True, False):
            parameters = [p for n, p in chosen if is_decayed(n, p) == decayed]
            decay = config.weight_decay if decayed else 0.0
            if parameters:
                groups.append({"params": parameters, "name": name, "peak_lr": peak_lr, "weight_decay": decay})
    return groups


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices that multiply activations, not for embeddings."""
    return parameter.ndim >= 2 and not name.startswith("vocab_embed.")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Rate over peak rate at 0-based `step` of `steps`: a linear warm-up, then constant, cosine or linear decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.final_ratio + (1 - config.final_ratio) * shape


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to `factor` times its peak; returns the first group's, the trunk's if it is trained."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
