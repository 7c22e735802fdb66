"""Samplers against exact enumeration, and what they count, carry and keep."""

import pytest
import torch
from scipy import stats

from scmdm.diffusion.sampler import SamplerSettings, draw_tokens, nucleus, sample
from scmdm.diffusion.schedule import LogLinear, make_schedule
from tests.diffusion.oracle import Oracle


def draw(oracle, settings, n=20000, seed=0, given=None, schedule=None, first_id=0):
    given = torch.full((n, oracle.length), oracle.mask_id) if given is None else given
    ids = torch.arange(first_id, first_id + len(given))
    return sample(
        oracle, given, ids, schedule=schedule or LogLinear(), settings=settings, mask_id=oracle.mask_id, seed=seed
    )


def chi_squared(oracle, tokens, expected):
    powers = oracle.tokens ** torch.arange(oracle.length - 1, -1, -1)
    counts = torch.bincount((tokens * powers).sum(1), minlength=len(expected))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return stats.chisquare(counts[possible].numpy(), (expected[possible] * len(tokens)).numpy()).pvalue


def ancestral_distribution(oracle, schedule, steps):
    """Exact output of the T-step ancestral sampler: tokens revealed in one step are drawn independently."""
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    states = {(oracle.mask_id,) * oracle.length: 1.0}
    for k in range(steps):
        alpha_t, alpha_s = schedule.alpha(grid[k]), schedule.alpha(grid[k + 1])
        p = 1.0 if k + 1 == steps else float((alpha_s - alpha_t) / (1 - alpha_t))
        following = {}
        for state, weight in states.items():
            for result, q in _step_outcomes(oracle, state, p):
                following[result] = following.get(result, 0.0) + weight * q
        states = following
    return torch.tensor([states.get(tuple(s.tolist()), 0.0) for s in oracle.sequences], dtype=torch.float64)


def _step_outcomes(oracle, state, p):
    conditionals = oracle.conditionals(torch.tensor([state]))[0]
    outcomes = [((), 1.0)]
    for position, token in enumerate(state):
        if token != oracle.mask_id:
            options = [(token, 1.0)]
        else:
            options = [(oracle.mask_id, 1 - p)] if p < 1 else []
            options += [(v, p * float(conditionals[position, v])) for v in range(oracle.tokens)]
        outcomes = [((*prefix, v), w * q) for prefix, w in outcomes for v, q in options if q > 0]
    return outcomes


@pytest.mark.parametrize(
    "schedule", [LogLinear(), make_schedule("cosine"), make_schedule("polynomial", power=2)], ids=str
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_matches_enumeration(steps, schedule):
    oracle = Oracle()
    tokens = draw(oracle, SamplerSettings(steps=steps), schedule=schedule).tokens
    assert chi_squared(oracle, tokens, ancestral_distribution(oracle, schedule, steps)) > 1e-3


def test_the_enumeration_can_tell_samplers_apart():
    """One step and five steps differ by more than the test forgives: the chi-squared test has power."""
    oracle = Oracle()
    tokens = draw(oracle, SamplerSettings(steps=1)).tokens
    assert chi_squared(oracle, tokens, oracle.joint) < 1e-6


@pytest.mark.parametrize("schedule", [LogLinear(), make_schedule("cosine")], ids=str)
def test_first_hitting_is_exact(schedule):
    oracle = Oracle()
    drawn = draw(oracle, SamplerSettings(kind="first_hitting"), schedule=schedule)
    assert drawn.evaluations == oracle.length
    assert chi_squared(oracle, drawn.tokens, oracle.joint) > 1e-3


@pytest.mark.parametrize("schedule", [LogLinear(), make_schedule("cosine"), make_schedule("polynomial")], ids=str)
def test_first_hitting_times_are_those_of_the_process(schedule):
    """With n masks left `1 - alpha_t` shrinks by the largest of n uniforms, whose n-th power is uniform."""
    oracle = Oracle()
    draw(oracle, SamplerSettings(kind="first_hitting"), schedule=schedule, n=4000)
    levels = [torch.ones(4000).double(), *(1 - schedule.alpha(t) for t in oracle.times)]
    for n, before, after in zip((3, 2, 1), levels, levels[1:], strict=False):
        assert stats.kstest(((after / before) ** n).numpy(), "uniform").pvalue > 1e-3


def test_the_denoiser_sees_the_times_of_the_grid():
    oracle = Oracle()
    draw(oracle, SamplerSettings(steps=4), n=5)
    assert torch.stack(oracle.times).tolist() == [[t] * 5 for t in (1.0, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize("kind", ["ancestral", "first_hitting"])
def test_given_tokens_stay_and_the_rest_follows(kind):
    """With enough steps (or one token a time) an infill follows the exact conditional."""
    oracle = Oracle()
    given = torch.tensor([[oracle.mask_id, 1, oracle.mask_id]]).expand(20000, -1)
    tokens = draw(oracle, SamplerSettings(kind=kind, steps=200), given=given).tokens
    expected = oracle.joint * (oracle.sequences[:, 1] == 1)
    assert chi_squared(oracle, tokens, expected / expected.sum()) > 1e-3


@pytest.mark.parametrize("kind", ["ancestral", "first_hitting"])
def test_a_sample_does_not_depend_on_its_batch(kind):
    settings = SamplerSettings(kind=kind, steps=4)
    whole = draw(Oracle(), settings, n=64).tokens
    alone = torch.cat([draw(Oracle(), settings, n=16, first_id=16 * k).tokens for k in range(4)])
    assert torch.equal(whole, alone)
    assert not torch.equal(whole, draw(Oracle(), settings, n=64, seed=1).tokens)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_carrying_costs_no_evaluation(steps, carry):
    oracle = Oracle()
    drawn = draw(oracle, SamplerSettings(steps=steps, carry=carry), n=32)
    assert drawn.evaluations == oracle.evaluations == steps


def test_what_is_carried():
    """Null at first; then the expected embedding where masked and the token's embedding where revealed."""
    oracle, states = Oracle(), []
    given = torch.full((16, 3), oracle.mask_id)
    sample(
        oracle,
        given,
        torch.arange(16),
        schedule=LogLinear(),
        settings=SamplerSettings(steps=4, carry=True),
        mask_id=oracle.mask_id,
        seed=0,
        on_step=lambda _, z: states.append(z),
    )
    assert oracle.estimates[0] is None
    seen = [given, *states]
    for k in range(1, 4):
        masked = (seen[k] == oracle.mask_id)[..., None]
        expected = torch.where(masked, oracle.conditionals(seen[k - 1]), oracle.embed(seen[k]))
        torch.testing.assert_close(oracle.estimates[k], expected)
    assert draw(Oracle(), SamplerSettings(steps=2), n=4).evaluations == 2


def test_temperature_and_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]]).log()
    kept = nucleus(logits.double(), 0.7).softmax(1)
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0, 0, 0]]).double())
    # 0.5 is reached by the first token alone, exactly.
    torch.testing.assert_close(nucleus(logits.double(), 0.5).softmax(1)[0, 0], torch.tensor(1.0).double())
    u = torch.rand(20000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sharp = draw_tokens(logits.expand(20000, -1), u, SamplerSettings(temperature=0.5))
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).double() ** 2
    counts = torch.bincount(sharp, minlength=5)
    assert counts[4] == 0
    assert stats.chisquare(counts[:4].numpy(), (20000 * p / p.sum()).numpy()).pvalue > 1e-3
    assert (draw_tokens(logits.expand(9, -1), u[:9], SamplerSettings(temperature=0)) == 0).all()


def test_float64_reaches_the_tail_that_float32_cuts():
    """With float32 uniforms the Gumbel noise ends near 17: a token 20 nats down can never win."""
    uniform = torch.tensor([[0.5, 1 - 2.0**-50]], dtype=torch.float64)
    logits = torch.tensor([[20.0, 0.0]])
    assert draw_tokens(logits, uniform, SamplerSettings(gumbel="float64")).item() == 1
    assert draw_tokens(logits + torch.tensor([[6.0, 0.0]]), uniform, SamplerSettings(gumbel="float32")).item() == 0
