"""Arguments of the model `scmdm` in the lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scmdm.config.common import compile_key, precision_key, seed_key, weights_dtype_key, weights_key
from scmdm.config.fields import key
from scmdm.config.loading import read_config

WHERE = "in the arguments of the model scmdm"


@dataclass
class HarnessOptions:
    """Arguments of the model, except for its path, its device and the keys of the sampler."""

    draws: int = key(
        128,
        help="masked states per continuation in the estimate of its likelihood, which is exact if it has no more",
        at_least=1,
        at_most=2**20,
    )
    tail: str = key("masked", help="positions after the continuation", choices=("masked", "none"))
    seed: int = seed_key()
    weights: str = weights_key()
    precision: str = precision_key()
    weights_dtype: str = weights_dtype_key()
    compile: str = compile_key()
    batch_size: int | None = key(1, help="requests in a batch; null: what fits into memory", at_least=1, at_most=2**20)
    gen_length: int | None = key(
        None, help="tokens to generate; null: the task's number, at most half of the length", at_least=1, at_most=2**19
    )
    add_bos_token: bool = key(True, help="begin sequences with [BOS]")
    cfg: float = key(
        0.0,
        help="classifier-free guidance by masking the context, as `cfg` in LLaDA's evaluation: logits are "
        "u + (cfg + 1) (l - u) with u those of the masked context",
        at_least=0,
        at_most=1e6,
    )
    is_check_greedy: bool = key(True, help="decide whether greedy decoding yields the continuation")
    escape_until: bool = key(False, help="return answers beyond the task's stop strings")


def read_options(keys: dict[str, Any]) -> HarnessOptions:
    """Check the arguments. The harness's command line turns `none` into None, and `batch_size` may be `auto:N`."""
    if "tail" in keys:
        keys["tail"] = keys["tail"] or "none"
    if str(keys.get("batch_size", 1)).startswith("auto"):
        keys["batch_size"] = None
    return read_config(HarnessOptions, keys, WHERE)
