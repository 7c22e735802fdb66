"""Schedules: boundary values, derivative, inverse, unmasking probability, forward process."""

import itertools
import math

import pytest
import torch
from scipy import stats

from scmdm.diffusion.process import noise_batch, stratified_times
from scmdm.diffusion.schedule import LogLinear, loss_weight, make_schedule, unmask_probability
from scmdm.diffusion.state import Sequences

SCHEDULES = [
    make_schedule("log_linear"),
    make_schedule("cosine"),
    make_schedule("cosine", eps=1e-3),
    make_schedule("polynomial", power=2.5),
]
t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedule_is_consistent(schedule):
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    last = 1 - math.cos(math.pi / 2 * getattr(schedule, "eps", 0.0))
    torch.testing.assert_close(ends, torch.tensor([1.0, last], dtype=torch.float64), atol=1e-12, rtol=0)
    h = 1e-6
    numeric = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.d_alpha(t), numeric, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(schedule.inverse(schedule.alpha(t)), t, atol=1e-9, rtol=0)


def test_log_linear_weight_is_one_over_t():
    torch.testing.assert_close(loss_weight(LogLinear(), t), 1 / t)


def test_mdlm_eps_keeps_a_little_signal():
    schedule = make_schedule("log_linear", eps=1e-3)
    assert float(schedule.alpha(torch.tensor(1.0, dtype=torch.float64))) == pytest.approx(1e-3)
    torch.testing.assert_close(loss_weight(schedule, t), 1 / t)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_unmasking_in_steps_equals_unmasking_at_once(schedule):
    """Surviving as a mask over a grid is the product of the steps: (1 - alpha_s) / (1 - alpha_t)."""
    grid = torch.linspace(1, 0.25, 7, dtype=torch.float64)
    stay = torch.stack([1 - unmask_probability(schedule, a, b) for a, b in itertools.pairwise(grid)])
    torch.testing.assert_close(stay.prod(), (1 - schedule.alpha(grid[-1])) / (1 - schedule.alpha(grid[0])))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_forward_process_masks_at_the_right_rate(schedule):
    ids, x = torch.arange(4000), torch.zeros(4000, 10, dtype=torch.int64)
    t_B = torch.full((4000,), 0.3, dtype=torch.float64)
    batch = noise_batch(
        Sequences(x, torch.ones_like(x).bool(), ids),
        t_B,
        schedule=schedule,
        mask_id=9,
        seed=1,
        step=0,
        rate=0.25,
        rollout_steps=1,
    )
    rate = float(1 - schedule.alpha(torch.tensor(0.3)))
    assert stats.binomtest(int((batch.z == 9).sum()), 40000, rate).pvalue > 1e-3
    assert stats.binomtest(int(batch.conditioned.sum()), 4000, 0.25).pvalue > 1e-3
    ((z_BL, t_B),) = batch.rollout
    assert ((batch.z == 9) <= (z_BL == 9)).all(), "the earlier state masks a superset"
    assert (t_B >= batch.t).all() and (z_BL == 9).sum() > (batch.z == 9).sum()


def test_invalid_tokens_are_never_masked():
    x = torch.arange(32).reshape(1, 32) % 5
    valid = x != 0
    batch = noise_batch(
        Sequences(x, valid, torch.arange(1)),
        torch.ones(1).double(),
        schedule=LogLinear(),
        mask_id=9,
        seed=0,
        step=0,
        rate=1,
    )
    assert torch.equal(batch.z == 9, valid)


def test_times_cover_the_interval_evenly_whatever_the_split():
    ids = torch.arange(100, 164)
    times = stratified_times(0, 5, ids, 1e-3)
    cells = ((times - 1e-3) / (1 - 1e-3) * 64).sort().values
    assert torch.allclose(cells.diff(), torch.ones(63, dtype=torch.float64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stratified_times(0, 5, ids[order], 1e-3), times[order])


def test_each_sample_sees_all_times():
    draws = torch.stack([stratified_times(0, step, torch.arange(8), 0.0) for step in range(1500)])
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
