"""A LLaMA-style transformer without a causal mask, as in LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487).

RMS norms, rotary positions, grouped-query attention, a gated MLP (SwiGLU), no time condition. Layer by layer it
computes what LLaMA, Mistral, Qwen2, Qwen3 and Granite in `transformers` compute; `scmdm.convert.families.decoders`
maps their configurations and the names of their weights.

Blocks may have a mixture of experts in place of the gated MLP, as in LLaDA-MoE and LLaDA2 (`scmdm.models.experts`).

Legend: B batch, L length, D width, H heads, G heads of keys and values, K width of a head, I width of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from scmdm.config.fields import OnAdapt, key
from scmdm.config.model import ModelConfig
from scmdm.diffusion.schedule import Schedule
from scmdm.errors import UserError
from scmdm.models.activation_checkpointing import in_float32
from scmdm.models.attention import NO_MASKS, Masks
from scmdm.models.conditioner import make_conditioner
from scmdm.models.experts.expert_block import ExpertMixture
from scmdm.models.experts.router import Router
from scmdm.models.linear import Linear
from scmdm.models.network import Network, TokenEmbedding
from scmdm.models.rotary import Rotary, RotaryScaling, attend_rotated


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


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 with a gain (arXiv 1910.07467)."""

    starts_at = 1.0

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result is float32."""
        return in_float32(self._normalise, x)

    def _normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class DecoderBlock(nn.Module):
    """Grouped-query attention and a gated MLP or experts, each after an RMS norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, number: int = 0) -> None:
        super().__init__()
        width, bias = config.width, config.attention_bias
        self.head_dim, self.attention = config.head_dim, config.attention
        self.dropout = config.dropout or 0.0
        self.query_multiplier, self.residual_multiplier = config.query_multiplier, config.residual_multiplier
        self.context: DeviceMesh | None = None
        self.norm1 = RMSNorm(width, config.norm_eps)
        self.attn_q = Linear(width, config.attention_width, bias=bias)
        self.attn_k = Linear(width, config.kv_width, bias=bias)
        self.attn_v = Linear(width, config.kv_width, bias=bias)
        self.norm_q = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.norm_k = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.attn_out = Linear(config.attention_width, width, bias=config.output_bias)
        self.norm2 = RMSNorm(width, config.norm_eps)
        self.experts = None
        if config.experts and number >= config.dense_layers:
            self.experts = expert_mixture(config)
            return
        self.mlp_gate = Linear(width, config.inner_width, bias=config.mlp_bias)
        self.mlp_up = Linear(width, config.inner_width, bias=config.mlp_bias)
        self.mlp_down = Linear(config.inner_width, width, bias=config.mlp_bias)

    def forward(self, x_BLD: Tensor, rotary: Tensor, dropout: bool, masks: Masks = NO_MASKS) -> Tensor:
        """Return the residual stream (B, L, D) after the block. `rotary`: table of `Rotary`; `masks`: `masks_of`."""
        h_BLD = self._attend(self.norm1(x_BLD), rotary, masks)
        x_BLD = x_BLD + self._scaled(F.dropout(h_BLD, self.dropout, dropout))
        h_BLD = self.norm2(x_BLD)
        h_BLD = self._gated_mlp(h_BLD) if self.experts is None else self.experts(h_BLD)
        return x_BLD + self._scaled(F.dropout(h_BLD, self.dropout, dropout))

    def _gated_mlp(self, h_BLD: Tensor) -> Tensor:
        mapped: Tensor = self.mlp_down(F.silu(self.mlp_gate(h_BLD)) * self.mlp_up(h_BLD))
        return mapped

    def _scaled(self, h_BLD: Tensor) -> Tensor:
        return h_BLD if self.residual_multiplier == 1 else self.residual_multiplier * h_BLD

    def _attend(self, h_BLD: Tensor, rotary: Tensor, masks: Masks) -> Tensor:
        projections = (self.attn_q, self.attn_k, self.attn_v)
        q, k, v = (projection(h_BLD).unflatten(2, (-1, self.head_dim)) for projection in projections)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if self.query_multiplier != 1:
            q = self.query_multiplier * q
        out_BLHK = attend_rotated(q, k, v, rotary, self.attention, masks, self.context, repeated=self.training)
        return self.attn_out(out_BLHK.flatten(2))


def expert_mixture(config: DecoderConfig) -> ExpertMixture:
    """Make the experts of a block."""
    router = Router(
        config.width,
        config.experts,
        config.experts_per_token,
        sigmoid=config.router == "sigmoid",
        groups=config.router_groups,
        top_groups=config.router_top_groups,
        scale=config.router_scale,
        renormalise=config.router_renormalise,
        balanced=config.router_bias,
    )
    inner = config.expert_inner_width
    return ExpertMixture(router, width=config.width, expert_width=inner, shared_width=config.shared_experts * inner)


class DecoderOutput(nn.Module):
    """Final norm and, unless the embedding is tied, the output head's weight, which `Network` applies."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(config.width, config.norm_eps)
        self.divisor = config.logits_divisor
        self.linear = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return normalised hidden states (B, L, D), float32, divided by the divisor of the logits."""
        h_BLD = self.norm_final(x_BLD)
        return h_BLD if self.divisor == 1 else h_BLD / self.divisor


class Decoder(Network):
    """Denoiser of LLaDA, Dream and models converted from LLaMA, Mistral, Qwen and Granite."""

    Config = DecoderConfig
    config: DecoderConfig

    def __init__(
        self, config: DecoderConfig, *, vocab_size: int, mask_id: int, schedule: Schedule, classes: int = 0
    ) -> None:
        assert not classes, "this kind of denoiser has no labels"
        super().__init__(config, mask_id=mask_id, schedule=schedule)
        self.vocab_embed = TokenEmbedding(vocab_size, config.width)
        self.rotary_emb = Rotary(config.rotated_width, config.rotary_base, config.scaling)
        self.blocks = nn.ModuleList(DecoderBlock(config, number) for number in range(config.layers))
        self.output_layer = DecoderOutput(config, vocab_size)
        self.conditioner = make_conditioner(config)

    def _scaled(self, x_BLD: Tensor) -> Tensor:
        """Multiply by `embedding_multiplier`."""
        return x_BLD if self.config.embedding_multiplier == 1 else self.config.embedding_multiplier * x_BLD

    def _align(self, h_BLD: Tensor, positions_BL: Tensor | None, clean_BLD: Tensor | None = None) -> Tensor:
        """Shift hidden states by one position if `logit_shift`; the first of a document predicts itself.

        The first position of a later block is predicted from the clean copy of the block before it.
        """
        if not self.config.logit_shift:
            return h_BLD
        assert self.context is None, "the hidden state before a slice is on another rank"
        shifted_BLD = torch.cat([h_BLD[:, :1], h_BLD[:, :-1]], dim=1)
        if clean_BLD is not None and self.block_length is not None:
            before_BLD = torch.cat([h_BLD[:, :1], clean_BLD[:, :-1]], dim=1)
            at_L = torch.arange(h_BLD.shape[1], device=h_BLD.device)
            positions = at_L if positions_BL is None else positions_BL
            shifted_BLD = torch.where((positions % self.block_length == 0)[..., None], before_BLD, shifted_BLD)
        if positions_BL is None:
            return shifted_BLD
        return torch.where((positions_BL == 0)[..., None], h_BLD, shifted_BLD)
