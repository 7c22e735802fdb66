"""Configuration of the denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LlamaConfig:
    """Of model.kind=llama."""

    kv_heads: int | None = None  # heads of keys and values; null: as many as model.heads
    mlp_width: int | None = None  # of the gated perceptron; null: model.mlp_ratio times model.width
    rotary_base: float = 10_000.0  # base of the rotary angles (rope_theta)
    norm_eps: float = 1e-5  # added to the mean square in RMS norms
    attention_bias: bool = False  # of queries, keys and values (Qwen2, Dream)
    tied: bool = False  # the output head is the embedding
    logit_shift: bool = False  # a position is predicted from the one before it (Dream, and autoregressive bases)


@dataclass
class ModelConfig:
    """Architecture of the denoiser. An adaptation takes it from its base; then only those from
    `conditioner` on may be set."""

    kind: str = "dit"  # dit (MDLM) | llama (LLaDA, Dream)
    width: int = 128
    layers: int = 6
    heads: int = 4
    condition_width: int = 32  # of the time condition (dit)
    mlp_ratio: int = 4
    time_conditioning: bool = False  # let the network see the noise level (dit)
    labels: bool = False  # let the network see the samples' labels (dit), for guidance
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    self_conditioned: bool = False  # has a conditioner; set by self_conditioning.rate > 0, not by hand
    conditioner: str = "projection"  # projection | norm | mlp
    inject_at: str = "all"  # all | masked: positions at which the estimate enters
    estimate_top_k: int | None = None  # the estimate is of so many most probable tokens, renormalised; null: of all
    estimate_rank: int | None = None  # seek those along so many principal axes of the head; null: among all logits
    lora_rank: int = 0  # adapt: of adapters beside the blocks' linear maps, trained with the conditioner alone; 0: none
    lora_alpha: float = 16.0  # an adapter counts lora_alpha / lora_rank times
    lora_targets: list[str] = field(default_factory=list)  # names of the maps within a block; none: all
    dropout: float | None = None  # null: the base's, or 0 without one
    attention: str = "auto"  # auto | sdpa | cudnn | flash | varlen (auto, but torch's varlen kernel for packed samples)
    head_chunk: int = 8192  # masked positions that the output head takes at once
    head_precision: str = "compute"  # float32 | compute (that of `precision`)
    activation_checkpointing: str = "none"  # none | selective (keep the products) | full (keep a block's input)
    compile: bool = False  # torch.compile of each block: minutes at the start, faster steps; on a CPU it needs g++

    @property
    def head_width(self) -> int:
        """Of queries, keys and values."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Of all heads of keys together."""
        return (self.llama.kv_heads or self.heads) * self.head_width

    @property
    def mlp_width(self) -> int:
        """Of the perceptron's inner layer."""
        return self.llama.mlp_width or self.mlp_ratio * self.width
