"""Initial weights, drawn per parameter: equal for any number of ranks, none of which holds a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scmdm.diffusion.noise import keyed_int
from scmdm.models.experts.expert_block import whole_parameters
from scmdm.models.tensor_files import first_row, local_part

_DRAWN_AT_ONCE = 2**20  # elements


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    starts_at = 0.0


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, *, only: Callable[[str], bool] = lambda _: True) -> None:
    """Fill parameters, whole or sharded (DTensor), with draws keyed on the seed and the parameter's name.

    Parameters of a module with the attribute `starts_at` get that constant, or the one that it maps their name to.
    Others are uniform within 1 / sqrt(width of the input), as in `torch.nn.Linear` (kaiming_uniform with a = sqrt(5)).
    `only` selects parameters by name. A rank has memory for its own part of a parameter alone.
    """
    whole = whole_parameters(model)
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        constants: float | dict[str, float] | None = getattr(module, "starts_at", None)
        for name in own:
            full_name = f"{path}.{name}"
            if not only(full_name):
                continue
            parameter = whole[full_name.removeprefix(".")]
            if constants is not None:
                local_part(parameter).fill_(constants[name] if isinstance(constants, dict) else constants)
            else:
                width = next(iter(own.values())).shape[-1]
                _draw(parameter, full_name, seed, width)


def initial_value(name: str, shape: Sequence[int], *, seed: int) -> Tensor:
    """Draw the weight of a linear map, float32."""
    value = torch.empty(*shape, dtype=torch.float32, device="cpu")
    _draw(value, name, seed, shape[-1])
    return value


def _draw(parameter: Tensor, name: str, seed: int, width: int) -> None:
    """Fill this rank's rows of a parameter; the draws of the rows before them are made in pieces and dropped."""
    local, bound = local_part(parameter), width**-0.5
    generator = torch.Generator().manual_seed(keyed_int(seed, f"init/{name}", 0))

    def draw(count: int) -> Tensor:
        piece = torch.empty(count, dtype=parameter.dtype, device="cpu")
        return piece.uniform_(-bound, bound, generator=generator)

    for size in _pieces(first_row(parameter) * math.prod(parameter.shape[1:]) if local.numel() else 0):
        draw(size)
    left = local.view(-1)
    for size in _pieces(len(left)):
        left[:size].copy_(draw(size))
        left = left[size:]


def _pieces(count: int) -> list[int]:
    return [_DRAWN_AT_ONCE] * (count // _DRAWN_AT_ONCE) + [count % _DRAWN_AT_ONCE]
