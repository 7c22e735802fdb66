"""What of a model an adaptation trains, and low-rank adapters (LoRA, arXiv 2106.09685) beside its linear maps.

`y = W x + b + (alpha / rank) B A x`, `B = 0` at the start: the adapted model is the base. Modules are named as `peft`
names them (`lora_A`, `lora_B` beside `weight`), so that its files are these parameters under a prefix.

Legend: R rank, I width of a map's input, O of its output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from scmdm.config.model import ModelConfig
from scmdm.config.run import RunConfig
from scmdm.errors import UserError
from scmdm.models.initialization import ZeroLinear
from scmdm.models.linear import Linear

_ADAPTER = re.compile(r"(.*)\.lora_[AB]\.weight")


class LoraLinear(Linear):
    """A linear map with an adapter."""

    def __init__(self, width: int, out: int, *, bias: bool, rank: int, alpha: float) -> None:
        super().__init__(width, out, bias=bias)
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = ZeroLinear(rank, out, bias=False)
        self.scale = alpha / rank

    def forward(self, x: Tensor, gate_O: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        assert not gelu, "the adapter comes behind the product's own kernel"
        added = self.scale * self.lora_B(self.lora_A(x))
        return super().forward(x, gate_O) + (added if gate_O is None else gate_O * added)


def add_adapters(blocks: nn.Module, config: ModelConfig) -> None:
    """Put `LoraLinear` in the place of every plain linear map of `blocks`, or of `config.lora_targets` alone.

    To be called before the model has weights. UserError when a target is no linear map of a block.
    """
    found = {name: module for name, module in blocks.named_modules() if type(module) is Linear}
    names = sorted({name.partition(".")[2] for name in found})
    for target in config.lora_targets:
        if target not in names:
            raise UserError(f"model.lora_targets={target} is not possible; it must be one of {', '.join(names)}")
    for name, module in found.items():
        if config.lora_targets and name.partition(".")[2] not in config.lora_targets:
            continue
        parent, _, own = name.rpartition(".")
        options: dict[str, Any] = {"rank": config.lora_rank, "alpha": config.lora_alpha}
        adapted = LoraLinear(module.in_features, module.out_features, bias=module.bias is not None, **options)
        setattr(blocks.get_submodule(parent), own, adapted)


def is_added(name: str) -> bool:
    """Whether an adaptation adds this parameter to its base."""
    return name.startswith("conditioner.") or _ADAPTER.fullmatch(name) is not None


def is_trained(name: str, config: RunConfig) -> bool:
    """Whether a run updates this parameter: everything, unless it says `train.last_layers` or has adapters."""
    layers = config.trained_layers
    if layers is None or is_added(name):
        return True
    return name.startswith("blocks.") and int(name.split(".")[1]) >= config.model.layers - layers


def freeze(model: nn.Module, config: RunConfig) -> None:
    """Take the gradient from what is not trained. UserError when nothing is left."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "train.last_layers=0 trains the conditioner alone, but there is none; set self_conditioning.rate above 0"
        )


def merged(weights: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """`W + (alpha / rank) B A` in the place of every `W` with an adapter, summed in float64; the rest as it is.

    The weights come in the order of their names, in which an adapter is before what it belongs to.
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
    """Names of the linear maps that have an adapter."""
    return sorted({match.group(1) for name in names if (match := _ADAPTER.fullmatch(name))})
