"""Configuration of `scmdm import` and `scmdm export`."""

from __future__ import annotations

from dataclasses import dataclass

from scmdm.config.common import weights_key
from scmdm.config.fields import PathKind, key
from scmdm.config.layouts import LAYOUTS

DTYPES = ("stored", "float32", "bfloat16", "float16")


@dataclass
class ImportConfig:
    """Properties that the files of a published model omit or misstate."""

    format: str = key(
        "auto",
        help="layout of the weights; auto: detected from the tensors' names; mdlm: also UDLM, Duo",
        choices=("auto", *LAYOUTS.names),
    )
    tokenizer: str | None = key(
        None,
        path=PathKind.INPUT,
        help="tokenizer.json, folder of a transformers tokenizer, or a tokenizer file of scmdm",
    )
    weights: str = weights_key()
    length: int | None = key(
        None,
        help="tokens per sample; null: the longest that the model's configuration states",
        at_least=2,
        at_most=2**24,
    )
    mask_id: int | None = key(
        None,
        help="id of the mask token; null: as in the model's or the tokenizer's files, or a new one",
        at_least=0,
        at_most=2**31,
    )
    bos_id: int | None = key(
        None,
        help="id of the token that begins a sample; null: as in the tokenizer's or the model's files, or [EOS]",
        at_least=0,
        at_most=2**31,
    )
    framing: str = key(
        "concatenate",
        help="framing of the data that the model was trained on; chats: in the form of the tokenizer's chat template, "
        "which it must have",
        choices=("concatenate", "records", "packed", "prompts", "chats"),
    )
    bos_policy: str | None = key(
        None,
        help="loss: [BOS] is masked like any token; given: never masked; null: loss for mdlm, given otherwise",
        choices=("loss", "given"),
    )
    time_conditioning: bool | None = key(
        None, help="mdlm: condition the network on the noise level; null: as in the model's configuration"
    )
    logit_shift: bool | None = key(
        None,
        help="decoder: predict a position from the one before it; null: as the files say (autoregressive models and "
        "Dream: true, LLaDA and dllm's A2D: false)",
    )
    block_length: int | None = key(
        None,
        help="tokens per block of a model that was trained for block diffusion (BD3-LM); null: as the files say "
        "(SDAR), otherwise no blocks (LLaDA2: give it)",
        at_least=1,
        at_most=2**24,
    )
    experts: int | None = key(
        None,
        help="upcycling: replace the gated MLP of each block by this many copies and a new router; null: no experts",
        at_least=2,
        at_most=2**16,
    )
    experts_per_token: int = key(
        2, help="with experts: experts that each token goes to, with weights of sum 1", at_least=1, at_most=2**16
    )
    ignore: list[str] = key(
        factory=list,
        help="fields of the model's configuration to take no notice of, dotted, as if they were absent; unknown fields "
        "are refused otherwise",
    )


@dataclass
class ExportConfig:
    """The layout and precision in which a model is written."""

    format: str = key(
        "scmdm",
        help="layout; hub: for transformers' AutoModel, peft: LoRA adapters alone",
        choices=("scmdm", *LAYOUTS.names, "hub", "peft"),
    )
    weights: str = weights_key()
    dtype: str = key("stored", help="data type of the weights; stored: unchanged", choices=DTYPES)
    shard_gb: float = key(5.0, help="maximum size of a weights file, in 10^9 bytes", above=0, at_most=1e6)
