"""Samplers against exact enumeration, and what they count, carry and keep."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from scmdm.diffusion.reveal_order import ORDERS, SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear, make_schedule, remask_probability, unmask_probability
from scmdm.diffusion.token_draw import certainty, draw_tokens, most_probable, nucleus, perturbed
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


def exact_distribution(oracle, schedule, settings, given=None):
    """Exact output of a sampler on a time grid, from all that can happen in each of its steps."""
    mask, start = oracle.mask_id, given or (oracle.mask_id,) * oracle.length
    size = settings.block_length or oracle.length
    blocks = [range(at, min(at + size, oracle.length)) for at in range(0, oracle.length, size)]
    states = {start: 1.0}
    for number, block in enumerate(blocks):
        steps = settings.steps // len(blocks) + (number < settings.steps % len(blocks))
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        drawn = [p for p in block if start[p] == mask]
        for k in range(steps):
            following = {}
            for state, weight in states.items():
                for result, q in _step_outcomes(oracle, state, schedule, settings, grid[k], grid[k + 1], drawn):
                    following[result] = following.get(result, 0.0) + weight * q
            states = following
    return torch.tensor([states.get(tuple(s.tolist()), 0.0) for s in oracle.sequences], dtype=torch.float64)


def _step_outcomes(oracle, state, schedule, settings, t, t_next, drawn):
    p = oracle.conditionals(torch.tensor([state]))[0]
    masked = [i for i in drawn if state[i] == oracle.mask_id]
    if settings.kind in ORDERS:
        left = 0 if t_next == 0 else round(len(drawn) * float(1 - schedule.alpha(t_next)))
        for tokens in itertools.product(range(oracle.tokens), repeat=len(masked)):
            score = {i: certainty_of(settings.kind, p[i], v) for i, v in zip(masked, tokens, strict=True)}
            chosen = sorted(masked, key=lambda i: -score[i])[: len(masked) - left]
            result = [v if i not in masked else oracle.mask_id for i, v in enumerate(state)]
            for i, v in zip(masked, tokens, strict=True):
                result[i] = v if i in chosen else oracle.mask_id
            yield tuple(result), float(torch.tensor([p[i, v] for i, v in zip(masked, tokens, strict=True)]).prod())
        return
    sigma = float(remask_probability(schedule, t, t_next, settings.remask, settings.remask_eta))
    reveal = 1.0 if t_next == 0 else float(unmask_probability(schedule, t, t_next, sigma))
    outcomes = [((), 1.0)]
    for i, token in enumerate(state):
        options = [(token, 1.0)]
        if i in masked:
            options = [(oracle.mask_id, 1 - reveal), *((v, reveal * float(p[i, v])) for v in range(oracle.tokens))]
        elif i in drawn and t_next > 0:
            options = [(token, 1 - sigma), (oracle.mask_id, sigma)]
        outcomes = [((*prefix, v), w * q) for prefix, w in outcomes for v, q in options if q > 0]
    yield from outcomes


def certainty_of(kind, p_V, token):
    if kind == "confidence":
        return float(p_V[token])
    ordered = sorted(p_V.tolist(), reverse=True)
    if kind == "margin":
        return ordered[0] - ordered[1]
    return sum(q * math.log(q) for q in ordered if q > 0)


@pytest.mark.parametrize(
    "schedule", [LogLinear(), make_schedule("cosine"), make_schedule("polynomial", power=2)], ids=str
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_matches_enumeration(steps, schedule):
    oracle = Oracle()
    tokens = draw(oracle, SamplerSettings(steps=steps), schedule=schedule).tokens
    assert chi_squared(oracle, tokens, exact_distribution(oracle, schedule, SamplerSettings(steps=steps))) > 1e-3


SETTINGS = [
    *(SamplerSettings(kind=kind, steps=steps) for kind in ORDERS for steps in (2, 3)),
    *(SamplerSettings(steps=4, remask=remask, remask_eta=0.4) for remask in ("cap", "rescale")),
    *(SamplerSettings(kind=kind, steps=4, block_length=2) for kind in ("ancestral", "margin")),
    SamplerSettings(steps=5, block_length=2, remask="rescale", remask_eta=0.5),
]


@pytest.mark.parametrize("schedule", [LogLinear(), make_schedule("cosine")], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.steps}-{s.block_length}-{s.remask}")
@pytest.mark.parametrize("prompt", [None, 1])
def test_every_sampler_matches_enumeration(settings, schedule, prompt):
    oracle = Oracle()
    start = (oracle.mask_id,) * 3 if prompt is None else (oracle.mask_id, prompt, oracle.mask_id)
    given = torch.tensor([start]).expand(20000, -1)
    drawn = draw(oracle, settings, given=given, schedule=schedule)
    assert drawn.evaluations == settings.steps
    expected = exact_distribution(oracle, schedule, settings, start)
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert chi_squared(oracle, drawn.tokens, expected) > 1e-3


def test_the_samplers_differ():
    """Or one of them could stand for another in the tests above."""
    different = [
        s for s in SETTINGS if (s.kind, s.steps) in (("confidence", 2), ("margin", 2)) or s.kind == "ancestral"
    ]
    found = [exact_distribution(Oracle(), LogLinear(), s) for s in (*different, SamplerSettings(steps=4))]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["margin", "entropy"])
def test_an_order_that_does_not_look_at_the_drawn_tokens_is_exact_one_at_a_time(kind):
    oracle = Oracle()
    torch.testing.assert_close(exact_distribution(oracle, LogLinear(), SamplerSettings(kind, 3)), oracle.joint)


def test_remasking_keeps_the_marginals_of_the_process():
    """Of a position that was masked or clean in the right proportion, when its token is known (ReMDM, theorem 3.1)."""
    t, s = torch.tensor([0.7, 0.6]).double()
    for kind, eta in (("cap", 0.1), ("rescale", 0.9), ("never", 0.0)):
        sigma = remask_probability(LogLinear(), t, s, kind, eta)
        clean = LogLinear().alpha(t) * (1 - sigma) + (1 - LogLinear().alpha(t)) * unmask_probability(
            LogLinear(), t, s, sigma
        )
        torch.testing.assert_close(clean, LogLinear().alpha(s))


@pytest.mark.parametrize("left", ["token", "null"])
def test_what_is_carried_of_a_token_that_is_taken_back(left):
    oracle, states = Oracle(), []
    settings = SamplerSettings(steps=6, carry=True, remask="rescale", remask_eta=1.0, remasked_estimate=left)
    given = torch.full((64, 3), oracle.mask_id)
    kwargs = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    sample(oracle, given, torch.arange(64), **kwargs, on_step=lambda step: states.append(step.z_BL))
    taken_back = 0
    for k, (before, after) in enumerate(itertools.pairwise(states), start=2):
        again = (before != oracle.mask_id) & (after == oracle.mask_id)
        taken_back += int(again.sum())
        if k < 6:
            carried = oracle.estimates[k][again]
            expected = oracle.embed(before[again]) if left == "token" else torch.zeros(int(again.sum()), oracle.vocab)
            torch.testing.assert_close(carried, expected.double())
    assert taken_back > 20


def test_blocks_come_one_after_the_other_and_those_of_a_prompt_cost_nothing():
    oracle, states = Oracle(length=4), []
    given = torch.tensor([[0, 1, oracle.mask_id, oracle.mask_id]]).expand(50, -1)
    settings = SamplerSettings(steps=6, block_length=1)
    kwargs = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    drawn = sample(oracle, given, torch.arange(50), **kwargs, on_step=lambda step: states.append(step.z_BL))
    assert drawn.evaluations == len(states) == 2
    assert (states[0][:, 2] != oracle.mask_id).all() and (states[0][:, 3] == oracle.mask_id).all()
    with pytest.raises(ValueError, match="3 steps for 4 blocks"):
        draw(Oracle(length=4), SamplerSettings(steps=3, block_length=1), n=2)


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
    draw(oracle, SamplerSettings(steps=4, carry=True), n=5)
    assert torch.stack(oracle.times).tolist() == [[t] * 5 for t in (1.0, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize("kind", ["ancestral", "first_hitting"])
def test_given_tokens_stay_and_the_rest_follows(kind):
    """With enough steps (or one token a time) an infill follows the exact conditional."""
    oracle = Oracle()
    given = torch.tensor([[oracle.mask_id, 1, oracle.mask_id]]).expand(20000, -1)
    tokens = draw(oracle, SamplerSettings(kind=kind, steps=200), given=given).tokens
    expected = oracle.joint * (oracle.sequences[:, 1] == 1)
    assert chi_squared(oracle, tokens, expected / expected.sum()) > 1e-3


@pytest.mark.parametrize("kind", ["ancestral", "first_hitting", *ORDERS])
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


class Counting(Oracle):
    """Remembers the sequences that it was given."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def hidden(self, state):
        self.seen.append((state.z_BL, state.t_B))
        return super().hidden(state)


@pytest.mark.parametrize("settings", [SamplerSettings(steps=40), SamplerSettings("margin", 40)], ids=lambda s: s.kind)
def test_sequences_that_reveal_nothing_are_not_evaluated(settings):
    """The oracle is asked at most once for a token, at the step's time, and the samples are those of asking always."""
    oracle, states = Counting(), []
    given, ids = torch.full((50, 3), oracle.mask_id), torch.arange(50)
    kwargs = {"schedule": LogLinear(), "settings": settings, "mask_id": oracle.mask_id, "seed": 0}
    drawn = sample(oracle, given, ids, **kwargs, on_step=lambda seen: states.append(seen.z_BL))
    assert drawn.evaluations == len(states) == 40
    changed = [
        (before[rows], 1 - k / 40)
        for k, (before, after) in enumerate(itertools.pairwise([given, *states]))
        if (rows := (before != after).any(1)).any()
    ]
    assert len(oracle.seen) == len(changed)
    for (z, t), (expected, time) in zip(oracle.seen, changed, strict=True):
        assert torch.equal(z, expected) and torch.allclose(t, torch.tensor(time).double())
    assert 50 < sum(len(z) for z, _ in oracle.seen) <= 150
    # The oracle knows no estimate: to carry one changes nothing but that every sequence is evaluated in every step,
    # unless idle steps are skipped.
    always = sample(Oracle(), given, ids, **{**kwargs, "settings": replace(settings, carry=True)})
    assert torch.equal(always.tokens, drawn.tokens)
    assert bool((always.positions_B == 3 * 40).all())
    skipping = replace(settings, carry=True, idle_steps="skip")
    idle = sample(Oracle(), given, ids, **{**kwargs, "settings": skipping})
    assert torch.equal(idle.tokens, drawn.tokens) and torch.equal(idle.positions_B, drawn.positions_B)


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
        on_step=lambda step: states.append(step.z_BL),
    )
    assert oracle.estimates[0] is None
    seen = [given, *states]
    for k in range(1, 4):
        masked = (seen[k] == oracle.mask_id)[..., None]
        expected = torch.where(masked, oracle.conditionals(seen[k - 1]), oracle.embed(seen[k]))
        torch.testing.assert_close(oracle.estimates[k], expected)
    assert draw(Oracle(), SamplerSettings(steps=2), n=4).evaluations == 2


def test_a_skipped_step_keeps_the_estimate_of_the_last_evaluation():
    oracle, settings = Counting(), SamplerSettings(steps=40, carry=True, idle_steps="skip")
    given = torch.full((1, 3), oracle.mask_id)
    sample(oracle, given, torch.arange(1), schedule=LogLinear(), settings=settings, mask_id=oracle.mask_id, seed=0)
    seen = [z_BL for z_BL, _ in oracle.seen]
    assert len(seen) == 3 and oracle.estimates[0] is None
    for before, after, estimate in zip(seen, seen[1:], oracle.estimates[1:], strict=False):
        masked = (after == oracle.mask_id)[..., None]
        torch.testing.assert_close(estimate, torch.where(masked, oracle.conditionals(before), oracle.embed(after)))


def test_temperature_and_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0]]).log()
    kept = nucleus(logits.double(), 0.7).softmax(1)
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0, 0, 0]]).double())
    # 0.5 is reached by the first token alone, exactly.
    torch.testing.assert_close(nucleus(logits.double(), 0.5).softmax(1)[0, 0], torch.tensor(1.0).double())
    u = torch.rand(20000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sharp = draw_tokens(logits.expand(20000, -1), u, temperature=0.5)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).double() ** 2
    counts = torch.bincount(sharp, minlength=5)
    assert counts[4] == 0
    assert stats.chisquare(counts[:4].numpy(), (20000 * p / p.sum()).numpy()).pvalue > 1e-3
    assert (draw_tokens(logits.expand(9, -1), u[:9], temperature=0) == 0).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30])
@pytest.mark.parametrize("gumbel", ["float64", "float32"])
def test_the_coldest_temperatures_take_the_best(temperature, gumbel):
    """Division by them overflows where nothing bounds them."""
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(50, 9, generator=generator), torch.rand(50, 9, generator=generator).double()
    drawn = draw_tokens(logits + 3, uniform, temperature=temperature, top_p=0.9, gumbel=gumbel)
    assert torch.equal(drawn, logits.argmax(1))
    score = torch.rand(50, 9, generator=generator).double()
    for shifted in (score, score - 2):  # probabilities, negative entropies
        assert torch.equal(perturbed(shifted, uniform, temperature).argsort(1), score.argsort(1))


def test_top_k():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    assert most_probable(logits, 2).softmax(1)[0].tolist() == pytest.approx([4 / 7, 0, 3 / 7, 0])
    assert torch.equal(most_probable(logits, None), logits) and torch.equal(most_probable(logits, 9), logits)


def test_float64_reaches_the_tail_that_float32_cuts():
    """With float32 uniforms the Gumbel noise ends near 17: a token 20 nats down can never win."""
    uniform = torch.tensor([[0.5, 1 - 2.0**-50]], dtype=torch.float64)
    logits = torch.tensor([[20.0, 0.0]])
    assert draw_tokens(logits, uniform, gumbel="float64").item() == 1
    assert draw_tokens(logits + torch.tensor([[6.0, 0.0]]), uniform, gumbel="float32").item() == 0


@pytest.mark.parametrize("kind", ["confidence", "margin", "entropy"])
def test_tokens_without_confidence_are_revealed_last(kind):
    """A position that is certain of an end token waits, although nothing else is left to be uncertain of."""
    logits = torch.tensor([[9.0, 4.0, -torch.inf], [1.0, 1.0, 0.5]])
    drawn = torch.tensor([0, 1])
    free, late = (certainty(kind, logits, drawn, late_ids=ids) for ids in ((), (0,)))
    assert free[0] > free[1] and late[0] < late[1]
