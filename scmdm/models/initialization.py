"""Fresh weights, one parameter at a time: the same on any number of ranks, and no rank ever holds a whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from scmdm.diffusion.noise import keyed_int


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero."""

    starts_at = 0.0


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, *, only: Callable[[str], bool] = lambda _: True) -> None:
    """Fill every parameter (whose name `only` accepts), whole or sharded (DTensor), with draws keyed on the seed
    and its name.

    A module with own parameters may say what they `starts_at`; otherwise they are uniform within 1 / sqrt(width of the
    input), as torch's linear maps are (kaiming_uniform with a = sqrt(5)).
    """
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        constant: float | None = getattr(module, "starts_at", None)
        for name, parameter in own.items():
            full_name = f"{path}.{name}"
            if not only(full_name):
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            if constant is not None:
                value.fill_(constant)
            else:
                bound = next(iter(own.values())).shape[-1] ** -0.5
                generator = torch.Generator().manual_seed(keyed_int(seed, f"init/{full_name}", 0))
                value.uniform_(-bound, bound, generator=generator)
            _assign(parameter, value)


def _assign(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        # No rank is the source: each cuts its part out of the same values.
        value = distribute_tensor(
            value.to(parameter.to_local().device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)
