"""Samplers of the reverse process, each with or without the carried clean-state estimate.

The state is `(z, s)`: tokens and, for a self-conditioned model, the estimate that the last evaluation made. To carry it
costs no denoiser evaluation. What is revealed is decided before the tokens are drawn, from keyed noise: a sample does
not depend on the batch it is drawn in, and logits are needed only where something is revealed or estimated.

Legend: B batch, L length, D width, V vocabulary with the mask, N selected positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.process import first_hitting_position, reveal_mask
from scmdm.diffusion.schedule import Schedule, unmask_probability

_DRAW_ROWS = 512  # positions drawn at once: bounds the float64 block of logits and noise


class SamplingDenoiser(Protocol):
    """What the samplers need of a network; `hidden` is the one costly evaluation."""

    def hidden(self, z_BL: Tensor, t_B: Tensor, estimate_BLD: Tensor | None) -> Tensor: ...

    def logits(self, h_ND: Tensor) -> Tensor: ...

    def expected_embedding(self, h_ND: Tensor) -> Tensor: ...

    def embed(self, ids: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample. `gumbel="float32"` reproduces the truncated tail of older code (arXiv 2409.02908)."""

    kind: str = "ancestral"  # "ancestral" | "first_hitting"
    steps: int = 32  # ancestral: denoiser evaluations; first_hitting reveals one token an evaluation
    temperature: float = 1.0  # 0: most probable token
    top_p: float = 1.0  # nucleus: smallest set of tokens with this much probability
    gumbel: str = "float64"  # "float64" | "float32"
    carry: bool = False  # condition each step on the previous step's estimate


@dataclass(frozen=True)
class Samples:
    """Tokens (B, L) without masks, and the denoiser evaluations that made them."""

    tokens: Tensor
    evaluations: int


@dataclass(frozen=True)
class _Step:
    index: int
    t_B: Tensor  # time of the state that the denoiser sees
    reveal_BL: Tensor  # masked positions that this step unmasks


StepHook = Callable[[int, Tensor], None]


@torch.no_grad()
def sample(
    denoiser: SamplingDenoiser,
    given_BL: Tensor,
    ids_B: Tensor,
    *,
    schedule: Schedule,
    settings: SamplerSettings,
    mask_id: int,
    seed: int,
    on_step: StepHook | None = None,
) -> Samples:
    """Fill the masked positions of `given_BL` (int64); all other positions (a prompt, an infill frame) stay.

    `ids_B` (int64) name the samples: the same id, seed and settings give the same sample in any batch.
    `on_step(evaluations, z)` is called after every step.
    """
    z_BL, estimate, evaluations = given_BL, None, 0
    steps = _ancestral_steps if settings.kind == "ancestral" else _first_hitting_steps
    plan = steps(lambda: z_BL, ids_B, schedule, settings, mask_id, seed)
    for step in plan:
        h_BLD = denoiser.hidden(z_BL, step.t_B, estimate)
        evaluations += 1
        drawn_N = _draw(denoiser, h_BLD, step, ids_B, settings, seed)
        z_BL = z_BL.masked_scatter(step.reveal_BL, drawn_N)
        if settings.carry:
            estimate = _carried_estimate(denoiser, h_BLD, z_BL, mask_id)
        if on_step is not None:
            on_step(evaluations, z_BL)
    assert not bool((z_BL == mask_id).any())
    return Samples(z_BL, evaluations)


def _ancestral_steps(
    state: Callable[[], Tensor], ids_B: Tensor, schedule: Schedule, settings: SamplerSettings, mask_id: int, seed: int
) -> Iterator[_Step]:
    """A uniform time grid from 1 to 0; at the last step everything left is unmasked."""
    grid = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64, device=ids_B.device)
    for k in range(settings.steps):
        z_BL = state()
        last = k + 1 == settings.steps
        probability = torch.ones_like(grid[k]) if last else unmask_probability(schedule, grid[k], grid[k + 1])
        u_BL = keyed_uniform(seed, "reveal", k, ids_B, z_BL.shape[1])
        yield _Step(k, grid[k].expand(len(ids_B)), reveal_mask(z_BL, u_BL, probability.expand(len(ids_B)), mask_id))


def _first_hitting_steps(
    state: Callable[[], Tensor], ids_B: Tensor, schedule: Schedule, settings: SamplerSettings, mask_id: int, seed: int
) -> Iterator[_Step]:
    """First-hitting sampler (arXiv 2409.02908): with n masks left the next one falls when the mask level, uniform in
    each position, has shrunk by `u^(1/n)`; which one is uniform. Exact, one token an evaluation."""
    level_B = 1 - schedule.alpha(torch.ones(len(ids_B), dtype=torch.float64, device=ids_B.device))
    k = 0
    while bool((state() == mask_id).any()):
        z_BL = state()
        u_B2 = keyed_uniform(seed, "hit", k, ids_B, 2)
        n_B = (z_BL == mask_id).sum(1).clamp(min=1)
        level_B = level_B * u_B2[:, 0] ** (1 / n_B)
        yield _Step(k, schedule.inverse(1 - level_B), first_hitting_position(z_BL, u_B2[:, 1], mask_id))
        k += 1


def _draw(
    denoiser: SamplingDenoiser, h_BLD: Tensor, step: _Step, ids_B: Tensor, settings: SamplerSettings, seed: int
) -> Tensor:
    """Tokens (N,) at the revealed positions, in row-major order."""
    rows, columns = step.reveal_BL.nonzero(as_tuple=True)
    h_ND = h_BLD[rows, columns]
    keys_N = ids_B[rows] * step.reveal_BL.shape[1] + columns
    drawn = []
    for h, keys in zip(h_ND.split(_DRAW_ROWS), keys_N.split(_DRAW_ROWS), strict=True):
        logits_NV = denoiser.logits(h)
        uniform_NV = keyed_uniform(seed, "token", step.index, keys, logits_NV.shape[1])
        drawn.append(draw_tokens(logits_NV, uniform_NV, settings))
    return torch.cat(drawn)


def draw_tokens(logits_NV: Tensor, uniform_NV: Tensor, settings: SamplerSettings) -> Tensor:
    """Gumbel-max draw (N,) from `softmax(logits / temperature)` cut to its nucleus.

    float64 by default: a float32 uniform has 24 bits, cuts the Gumbel tail and so lowers the temperature
    (arXiv 2409.02908).
    """
    if settings.temperature == 0:
        return logits_NV.argmax(1)
    scaled_NV = nucleus(logits_NV.double() / settings.temperature, settings.top_p)
    if settings.gumbel == "float32":
        u = uniform_NV.mul(2**24).floor().mul(2.0**-24).float()
        return (scaled_NV.float() - (1e-10 - (u + 1e-10).log()).log()).argmax(1)
    return (scaled_NV - (-uniform_NV.log()).log()).argmax(1)


def nucleus(logits_NV: Tensor, top_p: float) -> Tensor:
    """Logits with minus infinity outside the smallest set of most probable tokens that holds at least `top_p`."""
    if top_p >= 1:
        return logits_NV
    ordered, order = logits_NV.sort(dim=1, descending=True)
    probability = ordered.softmax(1)
    outside = probability.cumsum(1) - probability >= top_p
    return logits_NV.masked_fill(outside.gather(1, order.argsort(1)), float("-inf"))


def _carried_estimate(denoiser: SamplingDenoiser, h_BLD: Tensor, z_BL: Tensor, mask_id: int) -> Tensor:
    """`p @ E` where still masked, the token's embedding elsewhere: (B, L, D)."""
    masked = z_BL == mask_id
    return denoiser.embed(z_BL).masked_scatter(masked[..., None], denoiser.expected_embedding(h_BLD[masked]))
