"""Parameter groups, AdamW and the learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from scmdm.config.training import OptimizerConfig, ScheduleConfig
from scmdm.models.conditioner import CONDITIONER_PREFIX


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Group the trained parameters of trunk and conditioner, with and without weight decay."""
    conditioner_lr = config.lr if config.conditioner_lr is None else config.conditioner_lr
    groups = []
    for name, peak_lr, in_conditioner in (("trunk", config.lr, False), ("conditioner", conditioner_lr, True)):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        chosen = [(n, p) for n, p in trained if n.startswith(CONDITIONER_PREFIX) == in_conditioner]
        for decayed in (True, False):
            parameters = [p for n, p in chosen if is_decayed(n, p) == decayed]
            decay = config.weight_decay if decayed else 0.0
            if parameters:
                groups.append({"params": parameters, "name": name, "peak_lr": peak_lr, "weight_decay": decay})
    return groups


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices that multiply activations, but not to embeddings."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed stage 3 empties parameters
    return len(shape) >= 2 and not name.startswith(("vocab_embed.", "cond_map."))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make fused AdamW (arXiv 1711.05101)."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def lr_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """Learning rate at 0-based `step` of `steps`, relative to its peak.

    Linear warm-up, from `initial_ratio` if there is one, followed by constant rate, cosine decay or linear decay to
    `final_ratio`, which is reached at `config.steps`, or else at `steps`. With `initial_ratio` this is the schedule of
    `transformers` (0: `get_constant_schedule_with_warmup`) and of timm (`CosineLRScheduler` with `warmup_prefix`).
    """
    steps = config.steps or steps
    if step < config.warmup_steps:
        if config.initial_ratio is None:
            return (step + 1) / config.warmup_steps
        return config.initial_ratio + (1 - config.initial_ratio) * step / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return config.final_ratio + (1 - config.final_ratio) * shape


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set the learning rate of every group to `factor` times its peak.

    Returns the rate of the first group, which is the trunk's if the trunk is trained.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
