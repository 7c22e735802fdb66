"""Averages and learning rates against plain forms of the published formulas, step by step."""

import math

import pytest
import torch

from scmdm.config.training import EmaConfig, ScheduleConfig
from scmdm.distributed.ema import Ema
from scmdm.training.optimizer import lr_factor
from tests.training.test_step import make


class PublishedAverage:
    """That of MDLM's code, which increments its count before it takes the decay."""

    def __init__(self, parameters, decay):
        self.decay, self.num_updates = decay, 0
        self.shadow = [p.clone() for p in parameters]

    def update(self, parameters):
        self.num_updates += 1
        one_minus_decay = 1 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for s, p in zip(self.shadow, parameters, strict=True):
            s.sub_(one_minus_decay * (s - p))


@pytest.mark.parametrize("decay", [0.9999, 0.6])
def test_averages_of_fifty_updates(decay):
    engine, _ = make()
    generator = torch.Generator().manual_seed(0)
    ours, theirs = Ema(engine, EmaConfig(decay=decay)), PublishedAverage(engine.parameters().values(), decay)
    assert ours.decay() == pytest.approx(2 / 11)
    for _ in range(50):
        with torch.no_grad():
            for parameter in engine.parameters().values():
                parameter += torch.randn(parameter.shape, generator=generator)
        ours.update(engine)
        theirs.update(engine.parameters().values())
    for found, expected in zip(ours.average.values(), theirs.shadow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_run_of_an_earlier_version_keeps_its_count():
    """Its checkpoint after k updates says k, with which its next decay was (1 + k) / (10 + k)."""
    ema = Ema(make()[0], EmaConfig())
    ema.update_number = 3  # as a resume sets it from the state
    assert ema.decay() == pytest.approx((1 + 3) / (10 + 3))


def constant_warmup(step, warmup):
    """`transformers.get_constant_schedule_with_warmup`, which MDLM uses."""
    return step / max(1.0, warmup) if step < warmup else 1.0


def cosine_decay_warmup(t, *, lr, lr_min, warmup_t, warmup_lr_init, t_initial):
    """timm's `CosineLRScheduler` with `warmup_prefix` and one cycle, as discrete-diffusion-guidance uses it."""
    if t < warmup_t:
        return warmup_lr_init + t * (lr - warmup_lr_init) / warmup_t
    t = t - warmup_t
    if t // t_initial > 0:
        return lr_min
    return lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(math.pi * t / t_initial))


@pytest.mark.parametrize("warmup", [0, 1, 2500])
def test_warm_up_of_mdlm(warmup):
    """The rates of torch's LambdaLR, whose first step has the rate 0."""
    config = ScheduleConfig(warmup_steps=warmup, initial_ratio=0.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: constant_warmup(step, warmup))
    for step in range(warmup + 3):
        assert lr_factor(step, 10_000, config) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("lr", "lr_min", "warmup", "steps"),
    [(3e-4, 3e-6, 1000, 25_000), (2e-3, 2e-6, 3000, 30_000)],
    ids=["qm9", "species"],
)
def test_cosine_decay_of_discrete_diffusion_guidance(lr, lr_min, warmup, steps):
    config = ScheduleConfig("cosine", warmup, initial_ratio=1e-6 / lr, final_ratio=lr_min / lr)
    published = {"lr": lr, "lr_min": lr_min, "warmup_t": warmup, "warmup_lr_init": 1e-6, "t_initial": steps - warmup}
    for step in [*range(5), *range(5, steps, 997), warmup - 1, warmup, warmup + 1, steps - 1, steps]:
        assert lr * lr_factor(step, steps, config) == pytest.approx(cosine_decay_warmup(step, **published), rel=1e-9)


def test_without_an_initial_ratio_the_warm_up_ends_at_the_peak():
    config = ScheduleConfig(warmup_steps=4)
    assert [lr_factor(step, 10, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
