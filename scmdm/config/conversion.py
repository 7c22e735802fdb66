"""The configuration of `scmdm import` and `scmdm export`."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.errors import UserError

LAYOUTS = ("mdlm", "llada", "dream", "llama", "qwen2")
DTYPES = ("stored", "float32", "bfloat16", "float16")
_WEIGHTS = ("ema", "raw")


@dataclass
class ImportConfig:
    """What a published model's files do not say, or say wrongly."""

    format: str = "auto"  # auto (by the names of the tensors) | mdlm (also UDLM, Duo) | llada | dream | llama | qwen2
    tokenizer: str | None = None  # tokenizer.json, a transformers tokenizer's folder, or a file that scmdm has saved
    weights: str = "ema"  # of a Lightning checkpoint: ema (where it has them) | raw
    length: int | None = None  # tokens of a sample; null: what the model's configuration says
    mask_id: int | None = None  # id of the mask; null: what model or tokenizer say, else it is added
    framing: str = "concatenate"  # of the data that it knows: concatenate | records | packed | prompts
    # loss | given (the first token is never masked); null: loss for mdlm, given otherwise
    bos_policy: str | None = None
    time_conditioning: bool | None = None  # mdlm: the network sees the noise level; null: what its configuration says
    logit_shift: bool | None = None  # a position is predicted from the one before; null: of dream, llama and qwen2

    def validate(self) -> None:
        """Raise UserError for a value that is not possible."""
        _require_one_of("format", self.format, ("auto", *LAYOUTS))
        _require_one_of("weights", self.weights, _WEIGHTS)
        _require_one_of("framing", self.framing, ("concatenate", "records", "packed", "prompts"))
        _require_one_of("bos_policy", self.bos_policy, (None, "loss", "given"))
        if self.length is not None and self.length < 2:
            raise UserError(f"length={self.length} is not possible; it must be at least 2")
        if self.mask_id is not None and self.mask_id < 0:
            raise UserError(f"mask_id={self.mask_id} is not possible; it must be the id of a token")


@dataclass
class ExportConfig:
    """How a model is written."""

    format: str = "scmdm"  # scmdm | mdlm | llada | dream | llama | qwen2 | hub (for AutoModel) | peft (LoRA alone)
    weights: str = "ema"  # ema (averaged, where there are any) | raw
    dtype: str = "stored"  # of the weights: stored (as they are) | float32 | bfloat16 | float16
    shard_gb: float = 5.0  # largest weights file, in 10^9 bytes

    def validate(self) -> None:
        """Raise UserError for a value that is not possible."""
        _require_one_of("format", self.format, ("scmdm", *LAYOUTS, "hub", "peft"))
        _require_one_of("weights", self.weights, _WEIGHTS)
        _require_one_of("dtype", self.dtype, DTYPES)
        if not self.shard_gb > 0:
            raise UserError(f"shard_gb={self.shard_gb} is not possible; it must be above 0")


def _require_one_of(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice is not None)
        raise UserError(f"{key}={value!r} is not possible; it must be one of {names}")
