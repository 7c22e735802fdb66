"""Trained parameters of an adaptation, and low-rank adapters of linear maps (LoRA, arXiv 2106.09685).

`y = W x + b + (alpha / rank) B A x`, with `B = 0` at the start, so that the adapted model equals the base. Modules are
named as in `peft` (`lora_A`, `lora_B` beside `weight`), whose files contain these parameters under a prefix.

Legend: R rank, I width of a map's input, O of its output.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from scmdm.config.model import ModelConfig
from scmdm.config.run import RunConfig
from scmdm.errors import UserError
from scmdm.models.conditioner import CONDITIONER_PREFIX
from scmdm.models.experts.expert_block import ExpertLinear
from scmdm.models.initialization import ZeroLinear
from scmdm.models.linear import Linear

EXPERT_BIAS = ".balance.expert_bias"
_ADAPTER = re.compile(r"(.*)\.lora_[AB]\.weight")


class LoraLinear(Linear):
    """A linear map with an adapter."""

    def __init__(self, width: int, out: int, *, bias: bool, rank: int, alpha: float) -> None:
        super().__init__(width, out, bias=bias)
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = ZeroLinear(rank, out, bias=False)
        self.scale = alpha / rank
        self.adapted = True  # false: as without an adapter

    def forward(self, x: Tensor, gate_O: Tensor | None = None) -> Tensor:
        """See `Linear.forward`; the gate also multiplies the adapter's output."""
        if not self.adapted:
            return super().forward(x, gate_O)
        added = self.scale * self.lora_B(self.lora_A(x))
        return super().forward(x, gate_O) + (added if gate_O is None else gate_O * added)


class ZeroExpertLinear(ExpertLinear):
    """A linear map per expert that starts at zero."""

    starts_at = 0.0


class LoraExpertLinear(ExpertLinear):
    """A linear map per expert, each with an adapter of its own."""

    def __init__(self, experts: int, width: int, out: int, *, rank: int, alpha: float) -> None:
        super().__init__(experts, width, out)
        self.lora_A = ExpertLinear(experts, width, rank)
        self.lora_B = ZeroExpertLinear(experts, rank, out)
        self.scale = alpha / rank
        self.adapted = True  # false: as without adapters

    def forward(self, x_PI: Tensor, ends_E: Tensor) -> Tensor:
        """See `ExpertLinear.forward`."""
        if not self.adapted:
            return super().forward(x_PI, ends_E)
        return super().forward(x_PI, ends_E) + self.scale * self.lora_B(self.lora_A(x_PI, ends_E), ends_E)


def add_adapters(blocks: nn.Module, config: ModelConfig) -> None:
    """Replace every `Linear` and `ExpertLinear` of `blocks`, or those in `config.lora_targets`, by `LoraLinear`.

    Call this before the model has weights. Raises UserError when a target is not a linear map of a block.
    """
    found = {name: module for name, module in blocks.named_modules() if type(module) in (Linear, ExpertLinear)}
    names = sorted({name.partition(".")[2] for name in found})
    for target in config.lora_targets:
        if target not in names:
            raise UserError(f"model.lora_targets={target} is not possible; it must be one of {', '.join(names)}")
    for name, module in found.items():
        if config.lora_targets and name.partition(".")[2] not in config.lora_targets:
            continue
        parent, _, own = name.rpartition(".")
        setattr(blocks.get_submodule(parent), own, _adapted(module, config))


def _adapted(module: nn.Module, config: ModelConfig) -> nn.Module:
    options: dict[str, Any] = {"rank": config.lora_rank, "alpha": config.lora_alpha}
    if isinstance(module, ExpertLinear):
        return LoraExpertLinear(module.experts, module.in_features, module.out_features, **options)
    assert isinstance(module, Linear)
    return LoraLinear(module.in_features, module.out_features, bias=module.bias is not None, **options)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapters within the context, through which no gradient may flow."""
    adapted = [module for module in model.modules() if isinstance(module, (LoraLinear, LoraExpertLinear))]
    for module in adapted:
        module.adapted = False
    try:
        yield
    finally:
        for module in adapted:
            module.adapted = True


def is_added(name: str) -> bool:
    """Return whether an adaptation adds this parameter to its base (conditioner or adapter)."""
    return name.startswith(CONDITIONER_PREFIX) or _ADAPTER.fullmatch(name) is not None


def is_trained(name: str, config: RunConfig) -> bool:
    """Return whether a run trains this parameter; `train.last_layers` and adapters restrict it."""
    if name.endswith(EXPERT_BIAS):  # has no gradient, see `update_balance`
        return False
    layers = config.trained_layers
    if layers is None or is_added(name):
        return True
    return name.startswith("blocks.") and int(name.split(".")[1]) >= config.model.layers - layers


def freeze(model: nn.Module, config: RunConfig) -> None:
    """Freeze parameters that are not trained. Raises UserError when none is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "train.last_layers=0 trains only the conditioner, but there is none; set self_conditioning.rate above 0"
        )


def merged(weights: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Replace each weight with an adapter by `W + (alpha / rank) B A`, summed in float64; pass other weights on.

    Weights must be sorted by name, so that adapters precede their weight.
    """
    adapters: dict[str, Tensor] = {}
    for name, value in weights:
        if _ADAPTER.fullmatch(name) is not None:
            adapters[name] = value
            continue
        a_RI, b_OR = (adapters.pop(f"{name.removesuffix('weight')}lora_{part}.weight", None) for part in "AB")
        if a_RI is not None and b_OR is not None:
            delta_OI = config.lora_alpha / config.lora_rank * (b_OR.double() @ a_RI.double())
            value = (value.double() + delta_OI).to(value.dtype)
        yield name, value
    assert not adapters


def adapted_modules(names: Iterable[str]) -> list[str]:
    """Return the names of linear maps that have an adapter."""
    return sorted({match.group(1) for name in names if (match := _ADAPTER.fullmatch(name))})
