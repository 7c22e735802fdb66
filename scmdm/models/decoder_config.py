"""Keys of `model.kind=decoder`, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scmdm.config.fields import OnAdapt, key
from scmdm.config.model import ModelConfig
from scmdm.errors import UserError
from scmdm.models.rotary import RotaryScaling

# Keys that need model.experts. Those that an adaptation sets anew (BALANCE_KEYS) are checked once its base is known.
_EXPERT_KEYS = (
    "experts_per_token",
    "expert_width",
    "shared_experts",
    "dense_layers",
    "router",
    "router_groups",
    "router_top_groups",
    "router_scale",
    "router_renormalise",
    "router_bias",
)
BALANCE_KEYS = ("router_bias_rate", "router_loss", "router_z_loss")


@dataclass
class DecoderConfig(ModelConfig):
    """Keys of `model.kind=decoder`."""

    kind: str = key("decoder", help="network: decoder (LLaDA, Dream; LLaMA, Qwen without causal mask)")
    kv_heads: int | None = key(
        None,
        at_least=1,
        at_most=1024,
        formerly=("model.llama.kv_heads",),
        help="heads of keys and values; null: model.heads",
    )
    mlp_width: int | None = key(
        None,
        at_least=1,
        at_most=2**20,
        formerly=("model.llama.mlp_width",),
        help="width of the gated MLP's hidden layer; null: model.mlp_ratio times model.width",
    )
    rotary_base: float = key(
        10_000.0,
        at_least=1,
        at_most=1e12,
        formerly=("model.llama.rotary_base",),
        help="base of the rotary angles (rope_theta)",
    )
    rotary_scaling: str = key(
        "none",
        choices=("none", "linear", "dynamic", "llama3", "yarn"),
        help="change of the rotary angles for long contexts; linear: divide all; dynamic: raise the base with the "
        "length; llama3: as in LLaMA 3.1; yarn: divide the slow ones and scale the scores",
    )
    rotary_factor: float = key(
        1.0,
        at_least=1,
        at_most=1e6,
        help="rotary_scaling: divisor of the angles, of slow ones with llama3 and yarn; dynamic: growth of the base",
    )
    rotary_slow_turns: float = key(
        1.0,
        above=0,
        at_most=1e6,
        help="rotary_scaling=llama3, yarn: angles with fewer turns in rotary_length positions are divided "
        "(low_freq_factor, beta_slow)",
    )
    rotary_fast_turns: float = key(
        4.0,
        above=0,
        at_most=1e6,
        help="rotary_scaling=llama3, yarn: angles with more turns in rotary_length positions are kept "
        "(high_freq_factor; beta_fast, which YaRN sets to 32)",
    )
    rotary_length: int = key(
        8192,
        at_least=1,
        at_most=2**31,
        help="rotary_scaling=dynamic, llama3, yarn: length of the pretraining (original_max_position_embeddings)",
    )
    rotary_attention_factor: float | None = key(
        None,
        above=0,
        at_most=1e3,
        help="rotary_scaling=yarn: factor of the rotated queries and keys; null: 0.1 ln(rotary_factor) + 1",
    )
    rotary_truncate: bool = key(
        True, help="rotary_scaling=yarn: interpolate between whole indices of angles (gpt-oss: false)"
    )
    rotary_fraction: float = key(
        1.0, above=0, at_most=1, help="part of a head's channels that is rotated, the first ones (LLaDA2: 0.5)"
    )
    norm_eps: float = key(
        1e-5,
        at_least=0,
        at_most=1,
        formerly=("model.llama.norm_eps",),
        help="epsilon of the RMS norms, added to the mean square",
    )
    qk_norm: bool = key(False, help="RMS norms of the heads of queries and keys (Qwen3)")
    attention_bias: bool = key(
        False,
        formerly=("model.llama.attention_bias",),
        help="biases of the query, key and value projections (Qwen2, Dream)",
    )
    output_bias: bool = key(False, help="bias of the projection of the attention's output")
    mlp_bias: bool = key(False, help="biases of the gated MLP")
    embedding_multiplier: float = key(
        1.0, above=0, at_most=1e4, help="factor of the embedding, with the mapped estimate (Granite)"
    )
    attention_multiplier: float | None = key(
        None, above=0, at_most=1e4, help="factor of attention scores (Granite); null: 1 / sqrt(width of a head)"
    )
    residual_multiplier: float = key(
        1.0, above=0, at_most=1e4, help="factor of what a block's two parts add to the residual stream (Granite)"
    )
    logits_divisor: float = key(1.0, above=0, at_most=1e4, help="divisor of the logits (Granite: logits_scaling)")
    tied: bool = key(False, formerly=("model.llama.tied",), help="use the token embedding as the output head")
    experts: int = key(
        0,
        at_least=0,
        at_most=2**16,
        help="routed experts of a block, each a gated MLP, in place of its MLP; 0: none",
    )
    experts_per_token: int = key(1, at_least=1, at_most=2**16, help="experts that each token goes to")
    expert_width: int | None = key(
        None, at_least=1, at_most=2**20, help="width of an expert's hidden layer; null: that of the gated MLP"
    )
    shared_experts: int = key(
        0, at_least=0, at_most=2**16, help="further experts, to which all tokens go; one MLP of their joint width"
    )
    dense_layers: int = key(0, at_least=0, at_most=1024, help="first blocks with a gated MLP instead of experts")
    router: str = key(
        "softmax", choices=("softmax", "sigmoid"), help="scores of experts: softmax (LLaDA-MoE) or sigmoid (LLaDA2)"
    )
    router_groups: int = key(
        1, at_least=1, at_most=2**15, help="groups of experts; with router_top_groups, a token goes to some groups only"
    )
    router_top_groups: int = key(
        1, at_least=1, at_most=2**15, help="groups whose experts a token may go to: those with the best two experts"
    )
    router_scale: float = key(
        1.0, above=0, at_most=1e4, help="factor of the weights of experts (routed_scaling_factor)"
    )
    router_renormalise: bool = key(True, help="divide the weights of a token's experts by their sum")
    router_bias: bool = key(
        False, help="choose experts by score plus a bias that balances their loads; it is updated without a gradient"
    )
    router_bias_rate: float = key(
        1e-3,
        at_least=0,
        at_most=1,
        on_adapt=OnAdapt.OWN,
        help="change of each expert's router_bias per step, up or down; 0: the bias stays as it is",
    )
    router_loss: float = key(
        0.0,
        at_least=0,
        at_most=1e3,
        on_adapt=OnAdapt.OWN,
        help="factor of the loss that balances the experts' loads within each sequence (1 per position when balanced)",
    )
    router_z_loss: float = key(
        0.0,
        at_least=0,
        at_most=1e3,
        on_adapt=OnAdapt.OWN,
        help="factor of the squared log-sum-exp of the router's logits, per position",
    )
    logit_shift: bool = key(
        False,
        formerly=("model.llama.logit_shift",),
        help="predict a position from the one before it (Dream, and autoregressive bases)",
    )

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return (self.kv_heads or self.heads) * self.head_dim

    @property
    def inner_width(self) -> int:
        """Width of the gated MLP's hidden layer."""
        return self.mlp_width or self.mlp_ratio * self.width

    @property
    def expert_inner_width(self) -> int:
        """Width of an expert's hidden layer."""
        return self.expert_width or self.inner_width

    @property
    def mlp_numbers(self) -> int:
        """See `ModelConfig`: of experts, the copies of a position, their hidden layers and results, and scores."""
        routed = self.experts_per_token * 3 * (self.width + self.expert_inner_width) + 2 * self.experts
        return max(super().mlp_numbers, routed) if self.experts else super().mlp_numbers

    @property
    def rotated_width(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def expert_layers(self) -> int:
        """Number of blocks with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def scaling(self) -> RotaryScaling | None:
        """Scaling of the rotary angles; None if they are not scaled."""
        if self.rotary_scaling == "none":
            return None
        amplitude = 1.0
        if self.rotary_scaling == "yarn":
            amplitude = self.rotary_attention_factor or 0.1 * math.log(self.rotary_factor) + 1
        return RotaryScaling(
            self.rotary_scaling,
            self.rotary_factor,
            low=self.rotary_slow_turns,
            high=self.rotary_fast_turns,
            length=self.rotary_length,
            amplitude=amplitude,
            truncate=self.rotary_truncate,
        )

    @property
    def query_multiplier(self) -> float:
        """Factor of the queries that turns the kernels' scale 1 / sqrt(K) into `attention_multiplier`."""
        return 1.0 if self.attention_multiplier is None else self.attention_multiplier * math.sqrt(self.head_dim)

    def block_matrix_elements(self) -> int:
        """Count the elements of the projections of attention and of the three maps of the gated MLP.

        Of experts, those that a token goes to count, and the router; with `dense_layers` it is the mean of all blocks.
        """
        dense = 3 * self.inner_width
        active = 3 * (self.experts_per_token + self.shared_experts) * self.expert_inner_width + self.experts
        mlp = (dense * (self.layers - self.expert_layers) + active * self.expert_layers) * self.width // self.layers
        return self.width * (2 * self.attention_width + 2 * self.kv_width) + mlp

    def validate(self) -> None:
        """Raise UserError for keys that exclude each other; see also `ModelConfig.validate`."""
        super().validate()
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads={self.kv_heads} is not possible; it must be a divisor of model.heads={self.heads}"
            )
        self._validate_rotary()
        self._validate_experts()

    def _validate_experts(self) -> None:
        if not self.experts:
            defaults = DecoderConfig()
            for name in _EXPERT_KEYS:
                if (value := getattr(self, name)) != getattr(defaults, name):
                    raise UserError(f"model.{name}={value} is not possible with model.experts=0; set model.experts")
            return
        if self.dense_layers >= self.layers:
            raise UserError(
                f"model.dense_layers={self.dense_layers} is not possible; it must be below model.layers={self.layers}"
            )
        if self.experts % self.router_groups or (self.router_groups > 1 and self.experts < 2 * self.router_groups):
            raise UserError(
                f"model.router_groups={self.router_groups} is not possible; it must divide model.experts="
                f"{self.experts} into groups of at least 2"
            )
        if self.router_top_groups > self.router_groups:
            raise UserError(
                f"model.router_top_groups={self.router_top_groups} is not possible; it must be at most "
                f"model.router_groups={self.router_groups}"
            )
        reachable = self.experts // self.router_groups * self.router_top_groups
        if self.experts_per_token > reachable:
            raise UserError(
                f"model.experts_per_token={self.experts_per_token} is not possible; it must be at most {reachable}, "
                "the experts of the groups that a token may go to"
            )
        for name, value, possible in (
            ("mlp_bias", self.mlp_bias, False),
            ("matmul_precision", self.matmul_precision, "compute"),
        ):
            if value != possible:
                raise UserError(
                    f"model.{name}={value} is not possible with model.experts={self.experts}; use {possible}"
                )
        if self.compile == "trunk":
            raise UserError(
                f"model.compile=trunk is not possible with model.experts={self.experts}, whose groups of tokens change "
                "from step to step; use model.compile=block"
            )

    def _validate_rotary(self) -> None:
        kind = self.rotary_scaling
        if kind == "none" and self.rotary_factor != 1:
            raise UserError(
                f"model.rotary_factor={self.rotary_factor:g} is not possible with model.rotary_scaling=none; leave it "
                "out, or set model.rotary_scaling"
            )
        if kind != "yarn" and self.rotary_attention_factor is not None:
            raise UserError(
                f"model.rotary_attention_factor={self.rotary_attention_factor:g} is not possible with "
                f"model.rotary_scaling={kind}; leave it out, or set model.rotary_scaling=yarn"
            )
        if kind in ("llama3", "yarn") and self.rotary_fast_turns <= self.rotary_slow_turns:
            raise UserError(
                f"model.rotary_fast_turns={self.rotary_fast_turns:g} is not possible; it must be above "
                f"model.rotary_slow_turns={self.rotary_slow_turns:g}"
            )
        if kind == "yarn" and self.rotary_base <= 1:
            raise UserError(
                f"model.rotary_base={self.rotary_base:g} is not possible with model.rotary_scaling=yarn; it must be "
                "above 1"
            )
        if kind == "dynamic" and self.rotated_width <= 2:
            raise UserError(
                f"model.rotary_scaling=dynamic is not possible with heads of which {self.rotated_width} channels are "
                "rotated; it needs more than 2"
            )
        if self.rotated_width % 2 or not self.rotated_width:
            raise UserError(
                f"model.rotary_fraction={self.rotary_fraction:g} is not possible with heads of width {self.head_dim}; "
                "an even number of channels must be rotated"
            )
