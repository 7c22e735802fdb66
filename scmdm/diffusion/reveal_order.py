"""Positions that a sampler reveals and remasks in each of its steps.

Legend: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.process import first_hitting_position, reveal_mask
from scmdm.diffusion.schedule import Schedule, remask_probability, unmask_probability

ORDERS = ("confidence", "margin", "entropy")


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler. `gumbel="float32"` reproduces the truncated tail of older code (arXiv 2409.02908)."""

    kind: str = "ancestral"  # "ancestral", "first_hitting", or one of ORDERS: most certain positions first
    steps: int = 32  # denoiser evaluations; first_hitting reveals one token per evaluation
    block_length: int | None = None  # positions per block, decoded left to right, with equal steps; None: one block
    remask: str = "never"  # ancestral: "never" | "cap" | "rescale" (ReMDM)
    remask_eta: float = 0.02  # cap: largest probability; rescale: fraction of the largest possible one
    remasked_estimate: str = "token"  # estimate of a remasked position: "token" (its former token) | "null"
    temperature: float = 1.0  # 0: most probable token
    top_k: int | None = None
    top_p: float = 1.0  # nucleus: smallest set of tokens with at least this probability
    gumbel: str = "float64"  # "float64" | "float32"
    guidance: float = 1.0  # with labels; 1: draw from p(x | label); above 1: away from p(x)
    carry: bool = False  # condition each step on the previous step's estimate


@dataclass(frozen=True)
class Step:
    """One denoiser evaluation, and the positions that change after it."""

    index: int  # keys the draws
    t_B: Tensor  # time of the denoiser's input
    candidates_BL: Tensor  # masked positions to reveal; with `count_B`, only the most certain of them
    count_B: Tensor | None = None
    remask_BL: Tensor | None = None  # positions to remask


@dataclass(frozen=True)
class Problem:
    """Input of a plan. `state()` returns the current sequences (B, L)."""

    state: Callable[[], Tensor]
    given_BL: Tensor  # sequences at the start
    ids_B: Tensor
    schedule: Schedule
    mask_id: int
    seed: int


def make_plan(problem: Problem, settings: SamplerSettings) -> Iterator[Step]:
    """Plan the steps of a sampler. Raises ValueError when there are fewer steps than blocks."""
    if settings.kind == "first_hitting":
        return _plan_first_hitting(problem)
    return _plan_on_grid(problem, settings)


def _plan_on_grid(problem: Problem, settings: SamplerSettings) -> Iterator[Step]:
    """Plan a uniform grid of times from 1 to 0 for each block; its last step reveals the rest of the block."""
    length, device = problem.given_BL.shape[1], problem.ids_B.device
    blocks = torch.arange(length, device=device).split(settings.block_length or length)
    if settings.steps < len(blocks):
        raise ValueError(f"{settings.steps} steps for {len(blocks)} blocks")
    index = 0
    for number, block in enumerate(blocks):
        steps = settings.steps // len(blocks) + (number < settings.steps % len(blocks))
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
        within_L = torch.zeros(length, dtype=torch.bool, device=device).index_fill(0, block, True)
        if not bool((problem.given_BL[:, block] == problem.mask_id).any()):
            index += steps  # a block of given tokens needs no evaluation
            continue
        later = len(blocks) - number - 1
        for k in range(steps):
            # The time refers to the whole sequence, in which later blocks are still masked.
            level = (1 - problem.schedule.alpha(grid[k]) + later) / len(blocks)
            t = problem.schedule.inverse(1 - level) if len(blocks) > 1 else grid[k]
            yield _grid_step(problem, settings, index, t, grid[k], grid[k + 1], within_L, last=k + 1 == steps)
            index += 1


def _grid_step(
    problem: Problem,
    settings: SamplerSettings,
    index: int,
    t_denoiser: Tensor,
    t: Tensor,
    t_next: Tensor,
    within_L: Tensor,
    *,
    last: bool,
) -> Step:
    z_BL, ids_B, schedule = problem.state(), problem.ids_B, problem.schedule
    t_B = t_denoiser.expand(len(ids_B))
    masked_BL = (z_BL == problem.mask_id) & within_L
    if settings.kind in ORDERS:
        count_B = ((problem.given_BL == problem.mask_id) & within_L).sum(1)
        left_B = torch.zeros_like(count_B) if last else (count_B * (1 - schedule.alpha(t_next))).round().long()
        return Step(index, t_B, masked_BL, (masked_BL.sum(1) - left_B).clamp(min=0))
    sigma = remask_probability(schedule, t, t_next, settings.remask, settings.remask_eta)
    probability = torch.ones_like(t) if last else unmask_probability(schedule, t, t_next, sigma)
    u_BL = keyed_uniform(problem.seed, "reveal", index, ids_B, z_BL.shape[1])
    reveal_BL = reveal_mask(z_BL, u_BL, probability.expand(len(ids_B)), problem.mask_id) & within_L
    if settings.remask == "never" or last:
        return Step(index, t_B, reveal_BL)
    u_BL = keyed_uniform(problem.seed, "remask", index, ids_B, z_BL.shape[1])
    drawn_BL = (problem.given_BL == problem.mask_id) & ~masked_BL & within_L
    return Step(index, t_B, reveal_BL, remask_BL=drawn_BL & (u_BL < sigma))


def _plan_first_hitting(problem: Problem) -> Iterator[Step]:
    """Plan the first-hitting sampler (arXiv 2409.02908): exact, one token per evaluation.

    With n masks left, the next position is revealed when the mask level has shrunk by the factor `u^(1/n)`; the
    position is uniform.
    """
    ids_B, schedule, mask_id = problem.ids_B, problem.schedule, problem.mask_id
    level_B = 1 - schedule.alpha(torch.ones(len(ids_B), dtype=torch.float64, device=ids_B.device))
    k = 0
    while bool((problem.state() == mask_id).any()):
        z_BL = problem.state()
        u_B2 = keyed_uniform(problem.seed, "hit", k, ids_B, 2)
        n_B = (z_BL == mask_id).sum(1).clamp(min=1)
        level_B = level_B * u_B2[:, 0] ** (1 / n_B)
        yield Step(k, schedule.inverse(1 - level_B), first_hitting_position(z_BL, u_B2[:, 1], mask_id))
        k += 1
