"""Dense objective and sampler: logits, log-softmax and draws of shape (B, L, V).

They follow MDLM (github.com/kuleshov-group/mdlm, `diffusion.py`: `_subs_parameterization`, `_ddpm_update`,
`_ddpm_caching_update`, `_sample_categorical`), on which most published code builds. Trunk, weights and optimizer
are scmdm's own, so that only objective and sampler are compared.

Legend: B batch, L length, D width, V vocabulary with the mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scmdm.diffusion.schedule import Schedule
from scmdm.diffusion.state import State
from scmdm.models.network import Network


class DenseDenoiser:
    """A dense implementation of `scmdm.diffusion.objective.Denoiser` with the weights of a network."""

    def __init__(self, model: Network) -> None:
        self._model = model

    def log_probabilities(self, state: State, *, dropout: bool = False) -> Tensor:
        """Return log-probabilities (B, L, V), float32, with SUBS: no mask, and unmasked tokens carry over."""
        model, z_BL = self._model, state.z_BL
        logits_BLV = F.linear(model.hidden(state, dropout=dropout), *model.head()).float()
        blocked = torch.zeros(logits_BLV.shape[-1], device=z_BL.device)
        blocked[model.mask_id] = -torch.inf
        log_p_BLV = (logits_BLV + blocked).log_softmax(-1)
        given_BLV = torch.full_like(log_p_BLV, -torch.inf).scatter_(2, z_BL[..., None], 0.0)
        return torch.where((z_BL == model.mask_id)[..., None], log_p_BLV, given_BLV)

    def lower(self, state: State, *, dropout: bool = False) -> Tensor | None:
        return self._model.lower(state, dropout=dropout)

    def estimate(self, state: State, *, dropout: bool = False) -> Tensor:
        return self.embed(self.log_probabilities(state, dropout=dropout).exp())

    def weighted_nll(self, state: State, x_BL: Tensor, weight_BL: Tensor) -> tuple[Tensor, Tensor]:
        log_p_BLV = self.log_probabilities(state, dropout=True)
        nll_BL = -log_p_BLV.gather(2, x_BL[..., None]).squeeze(2)
        return (nll_BL * weight_BL).sum(), nll_BL.detach()

    def embed(self, p_BLV: Tensor) -> Tensor:
        """Return the expected embedding (B, L, D)."""
        return p_BLV @ self._model.vocab_embed.embedding


LogProbabilities = Callable[[State], Tensor]


@torch.no_grad()
def sample_dense(
    log_probabilities: LogProbabilities,
    embed: Callable[[Tensor], Tensor],
    z_BL: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    mask_id: int,
    carry: bool,
    generator: torch.Generator,
    only: int | None = None,
    cached: bool = False,
) -> Tensor:
    """Sample as MDLM does; `carry` conditions each step on the previous step's expected embedding.

    `only` is the number of steps to run, all of which do the same work. `cached` enables MDLM's cache: without `carry`
    and time conditioning, a prediction is reused if the last step revealed nothing in the whole batch.
    """
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=z_BL.device)
    move = (1 - schedule.alpha(grid)).float()
    estimate, p_BLV = None, None
    for k in range(steps if only is None else only):
        if p_BLV is None:
            p_BLV = log_probabilities(State(z_BL, grid[k].expand(len(z_BL)), estimate)).exp()
        q_BLV = p_BLV * (move[k] - move[k + 1])
        q_BLV[..., mask_id] = move[k + 1]
        uniform_BLV = torch.rand(q_BLV.shape, generator=generator, device=z_BL.device, dtype=q_BLV.dtype)
        drawn_BL = (q_BLV / (1e-10 - (uniform_BLV + 1e-10).log())).argmax(-1)
        next_BL = torch.where(z_BL == mask_id, drawn_BL, z_BL)
        if carry:
            estimate = embed(p_BLV)
        if not cached or not torch.equal(next_BL, z_BL):
            p_BLV = None
        z_BL = next_BL
    return z_BL
