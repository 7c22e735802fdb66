"""Options of `scmdm plan` for the phases besides the steps."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.config.fields import key


@dataclass(frozen=True)
class PhaseSettings:
    """What is sampled and evaluated after a run, and the file system."""

    samples: int = key(1024, help="samples to draw from the model", at_least=1, at_most=2**24)
    sampler_steps: int = key(128, help="denoiser evaluations per sample", at_least=1, at_most=2**31)
    nelbo_samples: int = key(2048, help="sequences of the NELBO in an evaluation", at_least=1, at_most=2**40)
    nelbo_draws: int = key(4, help="times drawn per sequence of it", at_least=1, at_most=2**20)
    file_system: float = key(10.0, help="GB/s of the file system, all ranks together", above=0, at_most=1e6)
