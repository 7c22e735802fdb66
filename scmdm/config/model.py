"""Configuration keys that all denoisers share, and the registry of denoisers.

The keys of one kind of denoiser are declared in its module, in a subclass of `ModelConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scmdm.config.fields import OnAdapt, key, require
from scmdm.config.registry import Registry
from scmdm.errors import UserError

FP8_MULTIPLE = 16  # of the sides of a matrix, for the kernels of products in FP8

DENOISERS = Registry(
    "model.kind",
    "scmdm.denoisers",
    {
        "dit": "scmdm.models.dit:DiT",
        "decoder": "scmdm.models.decoder:Decoder",
    },
    formerly={"llama": "decoder"},
)


@dataclass
class ModelConfig:
    """Architecture of the denoiser.

    An adaptation takes the architecture from its base; `OnAdapt` says which keys it may still set. Subclasses add the
    keys of one kind and implement `block_matrix_elements`.
    """

    kind: str = key(
        "dit", help="network: dit (MDLM) | decoder (LLaDA, Dream; LLaMA, Mistral and Qwen without causal mask)"
    )
    width: int = key(128, at_least=2, at_most=65536, help="width of the residual stream")
    layers: int = key(6, at_least=1, at_most=1024, help="number of transformer blocks")
    heads: int = key(4, at_least=1, at_most=1024, help="attention heads per block")
    head_width: int | None = key(
        None, at_least=2, at_most=65536, help="width of a query, key or value head; null: model.width / model.heads"
    )
    mlp_ratio: int = key(4, at_least=1, at_most=64, help="width of the MLP's hidden layer divided by model.width")
    self_conditioned: bool = key(
        False,
        on_adapt=OnAdapt.OWN,
        help="whether the model has a conditioner; do not set it: it follows from self_conditioning.rate",
    )
    carried: str = key(
        "estimate",
        choices=("estimate", "hidden"),
        on_adapt=OnAdapt.CONDITIONER,
        help="what an evaluation passes on to the next: the estimate of the clean tokens as an expected embedding, or "
        "the last hidden state of every position",
    )
    mixing: str = key(
        "added",
        choices=("added", "interpolated"),
        on_adapt=OnAdapt.CONDITIONER,
        help="how the carried estimate or state enters; added: through the conditioner, added to the residual stream; "
        "interpolated: at masked positions, mixed with the mask's embedding by a learned weight that depends on the "
        "confidence of the prediction",
    )
    confidence: str = key(
        "entropy",
        choices=("entropy", "top1"),
        on_adapt=OnAdapt.CONDITIONER,
        help="mixing=interpolated: confidence of a prediction; entropy: 1 - entropy / log(tokens); top1: the largest "
        "probability",
    )
    confidence_slope: float = key(
        5.0,
        at_least=-100,
        at_most=100,
        on_adapt=OnAdapt.CONDITIONER,
        help="mixing=interpolated: initial slope of the share over the confidence; positive: certain predictions have "
        "the larger share, negative: uncertain ones",
    )
    conditioner: str = key(
        "projection",
        choices=("projection", "norm", "mlp"),
        on_adapt=OnAdapt.CONDITIONER,
        help="how the estimate is mapped before it is added to the residual stream",
    )
    inject_layer: int = key(
        0,
        at_least=0,
        at_most=1023,
        on_adapt=OnAdapt.CONDITIONER,
        help="block before which the mapped estimate is added to the residual stream, counted from 0; 0: to the "
        "embedding. Training runs the blocks below it once for both passes, unless these differ in state "
        "(self_conditioning.rollout_steps) or in dropout (estimate_dropout=false): then twice",
    )
    inject_at: str = key(
        "all", choices=("all", "masked"), on_adapt=OnAdapt.CONDITIONER, help="positions at which the estimate is added"
    )
    estimate_top_k: int | None = key(
        None,
        at_least=1,
        at_most=2**31,
        on_adapt=OnAdapt.CONDITIONER,
        help="compute the estimate from the k most probable tokens, renormalised; null: from all",
    )
    estimate_temperature: float = key(
        1.0,
        at_least=0.01,
        at_most=100,
        on_adapt=OnAdapt.CONDITIONER,
        help="temperature of the probabilities from which estimate and confidence are computed",
    )
    lora_rank: int = key(
        0,
        at_least=0,
        at_most=65536,
        on_adapt=OnAdapt.OWN,
        help="adapt: rank of LoRA adapters; only they and the conditioner are trained; 0: none",
    )
    lora_alpha: float = key(
        16.0, at_least=1e-9, at_most=1e9, on_adapt=OnAdapt.OWN, help="scale of LoRA adapters: lora_alpha / lora_rank"
    )
    lora_targets: list[str] = key(
        factory=list, on_adapt=OnAdapt.OWN, help="names of the linear maps of a block that get adapters; empty: all"
    )
    dropout: float | None = key(
        None,
        at_least=0,
        at_most=0.99,
        on_adapt=OnAdapt.OWN,
        help="dropout rate; null: that of the base, or 0 without a base",
    )
    attention: str = key(
        "auto",
        choices=("auto", "sdpa", "cudnn", "flash", "varlen"),
        on_resume=True,
        on_adapt=OnAdapt.OWN,
        help="attention kernel; varlen: as auto, with torch's varlen kernel for packed samples",
    )
    head_chunk: int = key(
        8192,
        at_least=1,
        at_most=2**31,
        on_resume=True,
        on_adapt=OnAdapt.OWN,
        help="masked positions that the output head processes at once",
    )
    head_precision: str = key(
        "compute",
        choices=("float32", "compute"),
        on_adapt=OnAdapt.OWN,
        help="dtype of the output head; compute: that of precision",
    )
    activation_checkpointing: str = key(
        "none",
        choices=("none", "selective", "full"),
        on_resume=True,
        on_adapt=OnAdapt.OWN,
        help="recompute activations in the backward pass; selective: all but matrix products and attention",
    )
    compile: str = key(
        "none",
        choices=("none", "block", "trunk"),
        on_resume=True,
        on_adapt=OnAdapt.OWN,
        help="torch.compile in training; block: each block, with one graph for all; trunk: all blocks as one graph, "
        "which takes longer to compile; a CPU needs a C++ compiler",
    )
    residual_precision: str = key(
        "float32",
        choices=("float32", "compute"),
        on_adapt=OnAdapt.OWN,
        help="dtype of the residual stream between blocks; compute: that of precision; norms compute in float32",
    )
    matmul_precision: str = key(
        "compute",
        choices=("compute", "fp8"),
        on_adapt=OnAdapt.OWN,
        help="dtype of the products of the blocks' linear maps in training; compute: that of precision; fp8: e4m3, and "
        "e5m2 for gradients, on a GPU of compute capability 8.9 or newer with precision=bfloat16",
    )

    @property
    def head_dim(self) -> int:
        """Width of a query, key or value head: `head_width`, or `width / heads`."""
        return self.head_width or self.width // self.heads

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return self.attention_width

    @property
    def inner_width(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.mlp_ratio * self.width

    @property
    def mlp_numbers(self) -> int:
        """Numbers per position that an evaluation of a block's MLP holds at once."""
        return self.width + 3 * self.inner_width

    @property
    def labels(self) -> bool:
        """Return whether the network is conditioned on labels of samples; a key of kinds that support labels."""
        return False

    @property
    def experts(self) -> int:
        """Return the number of routed experts of a block; a key of kinds that support them, as the next four."""
        return 0

    @property
    def router_bias(self) -> bool:
        """Return whether a bias balances the loads of experts."""
        return False

    @property
    def router_bias_rate(self) -> float:
        """Return by how much training moves the bias of an expert in a step."""
        return 0.0

    @property
    def router_loss(self) -> float:
        """Return the factor of the loss that balances experts."""
        return 0.0

    @property
    def router_z_loss(self) -> float:
        """Return the factor of the squared log-sum-exp of the router's logits."""
        return 0.0

    @property
    def logit_shift(self) -> bool:
        """Return whether a position is predicted from the one before it; a key of kinds that support this."""
        return False

    def block_matrix_elements(self) -> int:
        """Count the elements of a block's weight matrices that multiply every position, from which FLOPs follow."""
        raise NotImplementedError

    def validate(self) -> None:
        """Raise UserError for combinations that cannot work; single values are checked by the rules of their keys."""
        if self.head_width is None and self.width % self.heads:
            raise UserError(
                f"model.width={self.width} is not possible; it must be a multiple of model.heads={self.heads}, or give "
                "model.head_width"
            )
        if self.head_dim % 2:
            given = f"model.head_width={self.head_width}"
            if self.head_width is None:
                given = f"model.width={self.width} with model.heads={self.heads}"
            raise UserError(f"{given} is not possible; the width of a head must be even (rotary embeddings)")
        if self.compile == "block" and self.activation_checkpointing == "selective":
            raise UserError(
                "model.activation_checkpointing=selective is not possible with model.compile=block, which hides the "
                "matrix products of a block; use none or full, or model.compile=trunk"
            )
        if self.matmul_precision == "fp8":
            self._validate_fp8()
        self._validate_carrying()

    def _validate_carrying(self) -> None:
        """Raise UserError for keys that have no effect or no meaning with what is carried, and how it is mixed."""
        defaults = {name: field.default for name, field in ModelConfig.__dataclass_fields__.items()}

        def require_default(reason: str, *names: str) -> None:
            for name in names:
                value, default = getattr(self, name), defaults[name]
                shown = "null" if default is None else default
                require(value == default, f"model.{name}", value, f"{shown} with {reason}")

        if self.carried == "hidden":
            require_default("model.carried=hidden", "mixing", "estimate_top_k", "estimate_temperature")
        if self.mixing == "interpolated":
            require_default("model.mixing=interpolated", "conditioner", "inject_at", "inject_layer")
        else:
            require_default("model.mixing=added", "confidence", "confidence_slope")

    def _validate_fp8(self) -> None:
        """Raise UserError for widths whose products have no FP8 kernel."""
        widths = {
            "model.width": self.width,
            "the width of all query heads": self.attention_width,
            "the width of all key heads": self.kv_width,
            "the width of the MLP's hidden layer": self.inner_width,
        }
        for name, width in widths.items():
            if width % FP8_MULTIPLE:
                raise UserError(
                    f"model.matmul_precision=fp8 is not possible with {name} = {width}; it must be a multiple of "
                    f"{FP8_MULTIPLE}, or use matmul_precision=compute"
                )


def default_model() -> Any:
    """Make the configuration of the default denoiser, imported lazily because `scmdm.models` imports this package."""
    return DENOISERS.schema(ModelConfig.kind)()
