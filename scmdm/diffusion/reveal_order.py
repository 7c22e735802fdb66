"""Positions that a sampler reveals and remasks in each of its steps.

Legend: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.process import reveal_mask, uniform_position
from scmdm.diffusion.schedule import Schedule, remask_probability, unmask_probability
from scmdm.diffusion.token_draw import most_certain

ORDERS = ("confidence", "margin", "entropy")


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler.

    `gumbel="float32"` draws as MDLM's code does, with a truncated tail (arXiv 2409.02908): tokens and mask in one race
    if `kind` is "ancestral", otherwise tokens alone.
    """

    kind: str = "ancestral"  # "ancestral", "first_hitting", "random", or one of ORDERS: most certain positions first
    steps: int = 32  # denoiser evaluations; first_hitting reveals one token per evaluation
    eps: float = 0.0  # time at which the grid ends
    # ancestral: tokens that are masked there are drawn in the grid's last step ("last_step"), or in one more evaluation
    # drawn ("draw") or taken greedily ("greedy", MDLM)
    noise_removal: str = "last_step"
    transfer: str = "schedule"  # tokens per step, in ORDERS and "random": "schedule" | "even" | "ratio"
    threshold: float | None = None  # reveal all tokens of at least this confidence, and ignore steps (Fast-dLLM)
    factor: float | None = None  # reveal as many tokens as Fast-dLLM's factor rule says, and ignore steps
    block_length: int | None = None  # positions per block, decoded left to right, with equal steps; None: one block
    block_start: str = "sequence"  # where the first block begins: "sequence" | "prompt" (at its end)
    logit_shift: bool = False  # the denoiser predicts a position from the one before it, which a window must contain
    model_of_blocks: bool = False  # the denoiser sees no later blocks; estimates are null outside of a step's block
    # keys and values that evaluations do not compute again: "none" | "blocks" (finished ones, of a model of blocks:
    # exact) | "prefix" (what precedes the block, as in its first step; Fast-dLLM) | "dual" (what follows it, too)
    cache: str = "none"
    cache_check: int = 0  # prefix, dual: steps between two measurements of the difference that the cache makes; 0: none
    tempered_order: bool = False  # ORDERS rank by the distribution that tokens are drawn from, not by the model's
    alg_temp: float = 0.0  # ORDERS: draw positions from softmax(confidence / alg_temp); 0: the most certain ones
    remask: str = "never"  # ancestral: "never" | "cap" | "rescale" (ReMDM)
    remask_eta: float = 0.02  # cap: largest probability; rescale: fraction of the largest possible one
    remasked_estimate: str = "token"  # estimate of a remasked position: "token" (its former token) | "null"
    temperature: float = 1.0  # 0: most probable token
    top_k: int | None = None
    top_p: float = 1.0  # nucleus: smallest set of tokens with at least this probability
    top_p_first: bool = False  # restrict to top_p before top_k
    top_p_rule: str = "reaching"  # whether the token that reaches top_p belongs to the nucleus: "reaching" | "within"
    gumbel: str = "float64"  # "float64" | "float32"
    guidance: float = 1.0  # 1: draw from p(x | condition); above 1: away from p(x)
    guided_by: str = "label"  # the condition: "label" | "prompt"
    never_ids: tuple[int, ...] = ()  # tokens that are never drawn
    late_ids: tuple[int, ...] = ()  # tokens that ORDERS give no confidence, so that they are revealed last
    carry: bool = False  # condition each step on the estimate of the last evaluation
    idle_steps: str = "evaluate"  # with `carry`, of a sequence in which a step reveals nothing: "evaluate" | "skip"

    @property
    def adaptive(self) -> bool:
        """Whether confidence decides how many tokens a step reveals, and thereby the number of steps."""
        return self.threshold is not None or self.factor is not None

    @property
    def races_mask(self) -> bool:
        """Whether one draw decides both whether a position is revealed and its token."""
        return self.kind == "ancestral" and self.gumbel == "float32"


@dataclass(frozen=True)
class Step:
    """One denoiser evaluation, and the positions that change after it."""

    index: int  # keys the draws
    t_B: Tensor  # time of the denoiser's input
    candidates_BL: Tensor  # masked positions to reveal; with `count_B`, only the most certain of them
    count_B: Tensor | None = None  # with an adaptive number of tokens: the largest possible one
    reveal_B: Tensor | None = None  # probability to reveal a candidate, drawn with its token; None: 1
    greedy: bool = False  # take the most probable tokens
    remask_BL: Tensor | None = None  # positions to remask
    active_B: Tensor | None = None  # sequences that the step concerns; None: all
    block_B: Tensor | None = None  # number of the step's block in each sequence; None: no blocks
    first_B: Tensor | None = None  # first position of the step's block; None: no blocks
    end_B: Tensor | None = None  # position after the step's block

    def at(self, rows_N: Tensor) -> Step:
        """Return the evaluation of a selection of sequences, without remasking."""
        names = ("t_B", "candidates_BL", "count_B", "reveal_B", "first_B", "end_B")
        own = {name: part[rows_N] for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **own, remask_BL=None, active_B=None)


@dataclass(frozen=True)
class Problem:
    """Input of a plan. `state()` returns the current sequences (B, L)."""

    state: Callable[[], Tensor]
    given_BL: Tensor  # sequences at the start
    ids_B: Tensor
    schedule: Schedule
    mask_id: int
    seed: int
    lengths_B: Tensor | None = None  # tokens of each sequence without padding; None: all


@dataclass(frozen=True)
class Blocks:
    """Blocks of each sequence: the number of each position's block, -1 outside of blocks, and how many there are."""

    number_BL: Tensor
    count_B: Tensor


def make_blocks(problem: Problem, settings: SamplerSettings) -> Blocks:
    """Divide each sequence into blocks, from its first position or from its first masked one."""
    given_BL = problem.given_BL
    length, at_L = given_BL.shape[1], torch.arange(given_BL.shape[1], device=given_BL.device)
    start_B = torch.zeros(len(given_BL), dtype=torch.int64, device=given_BL.device)
    end_B = torch.full_like(start_B, length) if problem.lengths_B is None else problem.lengths_B
    if settings.block_start == "prompt":
        masked_BL = given_BL == problem.mask_id
        start_B = torch.where(masked_BL.any(1), masked_BL.int().argmax(1), end_B)
    size = settings.block_length or length
    within_BL = (at_L >= start_B[:, None]) & (at_L < end_B[:, None])
    number_BL = torch.where(within_BL, (at_L - start_B[:, None]) // size, -1)
    return Blocks(number_BL, ((end_B - start_B + size - 1) // size).clamp(min=1))


def make_plan(problem: Problem, settings: SamplerSettings) -> Iterator[Step]:
    """Plan the steps of a sampler. Raises ValueError when there are fewer steps than blocks."""
    if settings.kind == "first_hitting":
        steps = _plan_first_hitting(problem, settings)
    elif settings.adaptive:
        steps = _plan_adaptive(problem, settings)
    else:
        steps = _plan_on_grid(problem, settings)
    return steps if settings.block_length is None else _with_places(steps, make_blocks(problem, settings))


def _with_places(steps: Iterator[Step], blocks: Blocks) -> Iterator[Step]:
    """Add the place of each step's block, which has the step's candidates and what it remasks."""
    for step in steps:
        assert step.block_B is not None
        within_BL = blocks.number_BL == step.block_B[:, None]
        first_B = within_BL.int().argmax(1)
        yield replace(step, first_B=first_B, end_B=first_B + within_BL.sum(1))


@dataclass(frozen=True)
class _GridPoint:
    """Place of each sequence in its plan: block, and interval of the block's grid of times."""

    block_B: Tensor
    k_B: Tensor  # step within the block
    steps_B: Tensor  # steps of the block
    t_B: Tensor
    t_next_B: Tensor
    last_B: Tensor  # the step reveals the rest of the block


def _plan_on_grid(problem: Problem, settings: SamplerSettings) -> Iterator[Step]:
    """Plan a uniform grid of times from 1 to eps for each block, and the removal of the remaining noise."""
    blocks = make_blocks(problem, settings)
    most = int(blocks.count_B.max())
    if settings.steps < most:
        raise ValueError(f"{settings.steps} steps for {most} blocks")
    todo_BL = (problem.given_BL == problem.mask_id) & (blocks.number_BL >= 0)
    for index in range(settings.steps):
        point = _grid_point(index, blocks.count_B, settings)
        within_BL = blocks.number_BL == point.block_B[:, None]
        active_B = (todo_BL & within_BL).any(1)
        if bool(active_B.any()):  # a block of given tokens needs no evaluation
            step = _grid_step(problem, settings, index, point, blocks.count_B, within_BL, active_B)
            yield replace(step, block_B=point.block_B)
    masked_BL = problem.state() == problem.mask_id
    if settings.noise_removal != "last_step" and bool(masked_BL.any()):
        t_B = torch.full_like(problem.ids_B, settings.eps, dtype=torch.float64)
        greedy = settings.noise_removal == "greedy"
        one_B = torch.zeros_like(problem.ids_B)  # there is a single block
        yield Step(settings.steps, t_B, masked_BL, greedy=greedy, active_B=masked_BL.any(1), block_B=one_B)


def _grid_point(index: int, blocks_B: Tensor, settings: SamplerSettings) -> _GridPoint:
    """Return where each sequence is in step `index`: earlier blocks get the steps that remain of an even division."""
    few_B, longer_B = settings.steps // blocks_B, settings.steps % blocks_B
    border_B = longer_B * (few_B + 1)
    beyond_B = index - border_B
    among_longer_B = beyond_B < 0
    steps_B = few_B + among_longer_B
    block_B = torch.where(among_longer_B, index // (few_B + 1), longer_B + beyond_B // few_B)
    k_B = torch.where(among_longer_B, index % (few_B + 1), beyond_B % few_B)
    t_B, t_next_B = torch.empty_like(k_B, dtype=torch.float64), torch.empty_like(k_B, dtype=torch.float64)
    for steps in steps_B.unique().tolist():
        grid = torch.linspace(1, settings.eps, steps + 1, dtype=torch.float64, device=k_B.device)
        own_B = steps_B == steps
        t_B[own_B], t_next_B[own_B] = grid[k_B[own_B]], grid[k_B[own_B] + 1]
    last_B = (k_B + 1 == steps_B) & (settings.noise_removal == "last_step")
    return _GridPoint(block_B, k_B, steps_B, t_B, t_next_B, last_B)


def _grid_step(
    problem: Problem,
    settings: SamplerSettings,
    index: int,
    point: _GridPoint,
    blocks_B: Tensor,
    within_BL: Tensor,
    active_B: Tensor,
) -> Step:
    z_BL, ids_B, schedule = problem.state(), problem.ids_B, problem.schedule
    # The time refers to the whole sequence, in which later blocks are still masked.
    level_B = (1 - schedule.alpha(point.t_B) + (blocks_B - point.block_B - 1)) / blocks_B
    t_B = torch.where(blocks_B > 1, schedule.inverse(1 - level_B), point.t_B)
    masked_BL = (z_BL == problem.mask_id) & within_BL
    todo_BL = (problem.given_BL == problem.mask_id) & within_BL
    if settings.kind in ORDERS or settings.kind == "random":
        count_B = _scheduled_count(masked_BL.sum(1), todo_BL.sum(1), point, schedule, settings.transfer)
        if settings.kind in ORDERS:
            return Step(index, t_B, masked_BL, count_B, active_B=active_B)
        u_BL = keyed_uniform(problem.seed, "order", index, ids_B, z_BL.shape[1])
        return Step(index, t_B, most_certain(u_BL, masked_BL, count_B), active_B=active_B)
    sigma_B = remask_probability(schedule, point.t_B, point.t_next_B, settings.remask, settings.remask_eta)
    reveal_B = unmask_probability(schedule, point.t_B, point.t_next_B, sigma_B).masked_fill(point.last_B, 1.0)
    if settings.races_mask:
        step = Step(index, t_B, masked_BL, reveal_B=reveal_B, active_B=active_B)
    else:
        u_BL = keyed_uniform(problem.seed, "reveal", index, ids_B, z_BL.shape[1])
        reveal_BL = reveal_mask(z_BL, u_BL, reveal_B, problem.mask_id) & within_BL
        step = Step(index, t_B, reveal_BL, active_B=active_B)
    if settings.remask == "never":
        return step
    u_BL = keyed_uniform(problem.seed, "remask", index, ids_B, z_BL.shape[1])
    remask_BL = todo_BL & ~masked_BL & (u_BL < sigma_B[:, None]) & ~point.last_B[:, None]
    return replace(step, remask_BL=remask_BL)


def _scheduled_count(masked_B: Tensor, todo_B: Tensor, point: _GridPoint, schedule: Schedule, rule: str) -> Tensor:
    """Return how many of `masked_B` positions a step reveals, in a block with `todo_B` positions to generate."""
    if rule == "even":
        return todo_B // point.steps_B + (point.k_B < todo_B % point.steps_B)
    if rule == "ratio":
        part_B = (masked_B * unmask_probability(schedule, point.t_B, point.t_next_B)).long()
        return torch.where(point.last_B, masked_B, part_B)
    assert rule == "schedule", rule
    left_B = (todo_B * (1 - schedule.alpha(point.t_next_B))).round().long().masked_fill(point.last_B, 0)
    return (masked_B - left_B).clamp(min=0)


def _plan_adaptive(problem: Problem, settings: SamplerSettings) -> Iterator[Step]:
    """Plan steps that reveal confident tokens of a sequence's first unfinished block, until none is masked."""
    blocks, length = make_blocks(problem, settings), problem.given_BL.shape[1]
    lengths_B = torch.full_like(blocks.count_B, length) if problem.lengths_B is None else problem.lengths_B
    index = 0
    while bool((masked_BL := problem.state() == problem.mask_id).any()):
        first_B = blocks.number_BL.masked_fill(~masked_BL, length).min(1).values
        candidates_BL = masked_BL & (blocks.number_BL == first_B[:, None])
        t_B = problem.schedule.inverse(1 - masked_BL.sum(1).double() / lengths_B).clamp(max=1)
        yield Step(index, t_B, candidates_BL, candidates_BL.sum(1), active_B=masked_BL.any(1), block_B=first_B)
        index += 1


def _plan_first_hitting(problem: Problem, settings: SamplerSettings) -> Iterator[Step]:
    """Plan the first-hitting sampler (arXiv 2409.02908): exact, one token per evaluation.

    With n masks left, the next position is revealed when the mask level has shrunk by the factor `u^(1/n)`; the
    position is uniform. Each block begins anew.
    """
    ids_B, schedule, mask_id = problem.ids_B, problem.schedule, problem.mask_id
    blocks, length = make_blocks(problem, settings), problem.given_BL.shape[1]
    start_B = 1 - schedule.alpha(torch.ones(len(ids_B), dtype=torch.float64, device=ids_B.device))
    level_B, block_B, k = start_B, torch.full_like(ids_B, -1), 0
    while bool((masked_BL := problem.state() == mask_id).any()):
        first_B = blocks.number_BL.masked_fill(~masked_BL, length).min(1).values
        masked_BL = masked_BL & (blocks.number_BL == first_B[:, None])
        u_B2 = keyed_uniform(problem.seed, "hit", k, ids_B, 2)
        n_B = masked_BL.sum(1)
        level_B = torch.where(first_B == block_B, level_B, start_B) * u_B2[:, 0] ** (1 / n_B.clamp(min=1))
        block_B = first_B
        reveal_BL = uniform_position(masked_BL, u_B2[:, 1])
        # As on a grid, the time refers to the whole sequence.
        later_B = (blocks.count_B - block_B - 1).clamp(min=0)
        t_B = schedule.inverse(1 - (level_B + later_B) / blocks.count_B)
        yield Step(k, t_B, reveal_BL, active_B=n_B > 0, block_B=block_B)
        k += 1
