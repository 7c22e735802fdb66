"""Configuration of the distributed engines."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.config.fields import key


@dataclass
class FsdpConfig:
    """Keys of `engine=fsdp2`."""

    replicate: int = key(
        1,
        help="HSDP: number of groups of ranks; each holds a whole copy of the model, sharded within the group",
        at_least=1,
        at_most=2**20,
        on_resume=True,
    )
    reshard_after_estimate: bool = key(
        False,
        help="free the gathered weights between the two passes: less memory, more communication",
        on_resume=True,
    )
    offload: bool = key(
        False,
        help="keep weights, gradients, averages and optimizer state in host memory and update them there",
        on_resume=True,
    )
    context: int = key(
        1,
        help="context parallelism: ranks that share each sequence; must divide its length and model.heads",
        at_least=1,
        at_most=65536,
        on_resume=True,
    )
    experts: int = key(
        1,
        help="expert parallelism: consecutive ranks that share the experts of each layer; must divide model.experts",
        at_least=1,
        at_most=65536,
        on_resume=True,
    )


@dataclass
class DeepspeedConfig:
    """Keys of `engine=deepspeed`."""

    stage: int = key(
        2,
        help="ZeRO stage; 1: shards the optimizer's state, 2: also gradients, 3: also weights",
        at_least=1,
        at_most=3,
        on_resume=True,
    )
    param_persistence_threshold: int = key(
        100_000,
        help="stage 3: parameters with fewer elements are not sharded",
        at_least=0,
        at_most=2**31,
        on_resume=True,
        formerly=("deepspeed.whole_below",),
    )
