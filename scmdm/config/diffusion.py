"""Configuration of the diffusion process and of self-conditioning."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.config.fields import OnAdapt, key
from scmdm.config.presets import PRESETS


@dataclass
class DiffusionConfig:
    """The masking process. An adaptation takes it from its base, except for `t_min` and `block_length`."""

    schedule: str = key(
        "log_linear",
        help="noise schedule alpha_t",
        choices=("log_linear", "cosine", "polynomial"),
    )
    eps: float = key(
        0.0,
        help="log_linear and cosine: the schedule at (1 - eps) t; MDLM and Duo use 1e-3",
        at_least=0,
        at_most=0.5,
    )
    power: float = key(2.0, help="polynomial: alpha_t = 1 - t^power", at_least=0.1, at_most=16)
    t_min: float = key(
        1e-3,
        help="smallest time drawn in training; bounds the loss weight",
        at_least=1e-9,
        at_most=0.5,
        on_adapt=OnAdapt.OWN,
    )
    block_length: int | None = key(
        None,
        help="block diffusion (BD3-LM): tokens per block; each block sees itself and earlier ones, and is generated "
        "after them; null: no blocks, or those of the base",
        at_least=1,
        at_most=2**24,
        on_adapt=OnAdapt.OWN,
    )


@dataclass
class SelfConditioningConfig:
    """How training conditions the model on its own estimate of the clean tokens."""

    preset: str | None = key(
        None,
        choices=tuple(PRESETS),
        help="published method: fixes the keys that define it and changes the defaults of some others; null: none",
    )
    rate: float = key(
        0.0,
        help="probability that a sample's loss pass is conditioned on its estimate; 0: vanilla, 0.5: partial, 1: SCMDM",
        at_least=0,
        at_most=1,
    )
    carried_from: str = key(
        "own",
        help="model whose prediction training conditions on; own: the trained model; base: its frozen base (LoRA "
        "adapters switched off, else a copy of the base's weights). Sampling always carries the model's own prediction",
        choices=("own", "base"),
    )
    rollout_steps: int = key(
        0,
        help="evaluations of a short rollout that makes the estimate: from a noisier state to that of the loss pass, "
        "each conditioned on the last, without gradients; 0: no rollout",
        at_least=0,
        at_most=64,
    )
    rollout_span: float = key(
        1.0,
        help="largest distance in time between the first state of a rollout and that of the loss pass; a sampler of T "
        "steps carries over 1/T",
        above=0,
        at_most=1,
    )
    perturbation: float = key(
        0.0,
        help="standard deviation of Gaussian noise that training adds to what is carried, at masked positions relative "
        "to the root mean square of the token embeddings, or to that of each hidden state",
        at_least=0,
        at_most=100,
    )
    passes: int = key(1, help="passes that make the estimate", at_least=1, at_most=64)
    estimate_dropout: bool = key(True, help="apply dropout in the passes that make the estimate")
    stop_gradient: bool = key(True, help="do not propagate gradients through the passes that make the estimate")
