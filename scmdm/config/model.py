"""Configuration of the denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field

from scmdm.config.fields import OnAdapt, key


@dataclass
class LlamaConfig:
    """Keys of `model.kind=llama`."""

    kv_heads: int | None = key(
        None, help="heads of keys and values; null: the number of model.heads", at_least=1, at_most=1024
    )
    mlp_width: int | None = key(
        None,
        help="width of the gated perceptron; null: model.mlp_ratio times model.width",
        at_least=1,
        at_most=2**20,
    )
    rotary_base: float = key(10_000.0, help="base of the rotary angles (rope_theta)", at_least=1, at_most=1e12)
    norm_eps: float = key(1e-5, help="added to the mean square in RMS norms", at_least=0, at_most=1)
    attention_bias: bool = key(False, help="biases of queries, keys and values (Qwen2, Dream)")
    tied: bool = key(False, help="share the weights of output head and embedding")
    logit_shift: bool = key(False, help="predict a position from the one before it (Dream, and autoregressive bases)")


@dataclass
class ModelConfig:
    """Architecture of the denoiser.

    An adaptation takes it from its base, except for the keys declared with another `on_adapt`.
    """

    kind: str = key("dit", help="network: dit (MDLM) or llama (LLaDA, Dream)", choices=("dit", "llama"))
    width: int = key(128, help="width of the hidden states", at_least=2, at_most=65536)
    layers: int = key(6, help="number of blocks", at_least=1, at_most=1024)
    heads: int = key(4, help="attention heads", at_least=1, at_most=1024)
    condition_width: int = key(32, help="width of the time condition (dit)", at_least=1, at_most=65536)
    mlp_ratio: int = key(4, help="width of the perceptron over model.width", at_least=1, at_most=64)
    time_conditioning: bool = key(False, help="condition the network on the noise level (dit)")
    labels: bool = key(False, help="condition the network on the samples' labels (dit), for guidance")
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    self_conditioned: bool = key(
        False,
        help="whether the model has a conditioner; follows from self_conditioning.rate, not to be set by hand",
        on_adapt=OnAdapt.OWN,
    )
    conditioner: str = key(
        "projection",
        help="network that adds the estimate to the embedding",
        choices=("projection", "norm", "mlp"),
        on_adapt=OnAdapt.CONDITIONER,
    )
    inject_at: str = key(
        "all",
        help="positions at which the estimate is added",
        choices=("all", "masked"),
        on_adapt=OnAdapt.CONDITIONER,
    )
    estimate_top_k: int | None = key(
        None,
        help="restrict the estimate to this number of most probable tokens, renormalised; null: all tokens",
        at_least=1,
        at_most=2**31,
        on_adapt=OnAdapt.CONDITIONER,
    )
    estimate_rank: int | None = key(
        None,
        help="search the tokens of estimate_top_k along this number of principal axes of the head; null: exactly",
        at_least=1,
        at_most=65536,
        on_adapt=OnAdapt.CONDITIONER,
    )
    lora_rank: int = key(
        0,
        help="adapt: rank of the LoRA adapters, which are then trained with the conditioner alone; 0: no adapters",
        at_least=0,
        at_most=65536,
        on_adapt=OnAdapt.OWN,
    )
    lora_alpha: float = key(
        16.0,
        help="adapt: scale of the LoRA adapters, multiplied by lora_alpha / lora_rank",
        at_least=1e-9,
        at_most=1e9,
        on_adapt=OnAdapt.OWN,
    )
    lora_targets: list[str] = key(
        factory=list,
        help="adapt: names of the linear layers of a block that get LoRA adapters; empty: all",
        on_adapt=OnAdapt.OWN,
    )
    dropout: float | None = key(
        None,
        help="dropout probability; null: that of the base, or 0 without one",
        at_least=0,
        at_most=0.99,
        on_adapt=OnAdapt.OWN,
    )
    attention: str = key(
        "auto",
        help="attention kernel (varlen: as auto, with torch's variable-length kernel for packed samples)",
        choices=("auto", "sdpa", "cudnn", "flash", "varlen"),
        on_resume=True,
        on_adapt=OnAdapt.OWN,
    )
    head_chunk: int = key(
        8192,
        help="masked positions per call of the output head",
        at_least=1,
        at_most=2**31,
        on_resume=True,
        on_adapt=OnAdapt.OWN,
    )
    head_precision: str = key(
        "compute",
        help="precision of the output head; compute: that of the key `precision`",
        choices=("float32", "compute"),
        on_adapt=OnAdapt.OWN,
    )
    activation_checkpointing: str = key(
        "none",
        help="activations recomputed in the backward pass: none, all but matrix products, or all of a block",
        choices=("none", "selective", "full"),
        on_resume=True,
        on_adapt=OnAdapt.OWN,
    )
    compile: bool = key(
        False,
        help="compile each block with torch.compile: a slower start, faster steps; on a CPU it needs a C++ compiler",
        on_resume=True,
        on_adapt=OnAdapt.OWN,
    )

    @property
    def head_width(self) -> int:
        """Width of each head's queries, keys and values."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Width of the keys of all heads together."""
        return (self.llama.kv_heads or self.heads) * self.head_width

    @property
    def mlp_width(self) -> int:
        """Inner width of the perceptron."""
        return self.llama.mlp_width or self.mlp_ratio * self.width
