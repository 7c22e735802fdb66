"""Initial weights, drawn per parameter: equal for any number of ranks, none of which holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from scmdm.diffusion.noise import keyed_int


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    starts_at = 0.0


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, *, only: Callable[[str], bool] = lambda _: True) -> None:
    """Fill parameters, whole or sharded (DTensor), with draws keyed on the seed and the parameter's name.

    Parameters of a module with the attribute `starts_at` get that constant, or theirs of a mapping.
    Others are uniform within 1 / sqrt(width of the input), as in `torch.nn.Linear` (kaiming_uniform with a = sqrt(5)).
    `only` selects parameters by name.
    """
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        constants: float | dict[str, float] | None = getattr(module, "starts_at", None)
        for name, parameter in own.items():
            full_name = f"{path}.{name}"
            if not only(full_name):
                continue
            if constants is not None:
                constant = constants[name] if isinstance(constants, dict) else constants
                value = torch.full(parameter.shape, constant, dtype=parameter.dtype)
            else:
                width = next(iter(own.values())).shape[-1]
                value = initial_value(full_name, parameter.shape, seed=seed, width=width, dtype=parameter.dtype)
            _assign(parameter, value)


def initial_value(
    name: str,
    shape: Sequence[int],
    *,
    seed: int,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw a parameter of a linear map whose input has `width` channels (None: the last dimension of the shape)."""
    bound = (width or shape[-1]) ** -0.5
    generator = torch.Generator().manual_seed(keyed_int(seed, f"init/{name}", 0))
    return torch.empty(*shape, dtype=dtype, device="cpu").uniform_(-bound, bound, generator=generator)


def _assign(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        # Every rank has drawn the same values, so that nothing needs to be sent.
        value = distribute_tensor(
            value.to(parameter.to_local().device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)
