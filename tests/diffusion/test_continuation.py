"""Likelihood of a continuation: against enumeration by an oracle, and greedy decoding against decoding by hand."""

import itertools
import math

import pytest
import torch

from scmdm.diffusion.continuation import greedy_agrees, masked_nll, masked_states
from scmdm.diffusion.schedule import Cosine, LogLinear
from tests.diffusion.oracle import BlockOracle, Oracle

LOG_LINEAR = LogLinear()


def bound(oracle, x, given, draws, *, key=0, seed=0, condition=False, schedule=LOG_LINEAR):
    """The estimate for `x`, of which the first `given` tokens are the context."""
    n = len(x) - given
    block_length = getattr(oracle, "block_length", None)
    states = masked_states(n, draws, seed=seed, key=key, start=given, block_length=block_length)
    weight = torch.zeros(len(states.masked_KN), len(x), dtype=torch.float64)
    weight[:, given:] = states.weight_KN
    nll = masked_nll(
        oracle,
        torch.tensor(x).expand(len(weight), -1),
        weight > 0,
        weight,
        states.masked_KN.double().mean(1),
        schedule=schedule,
        mask_id=oracle.mask_id,
        condition=condition,
        model_of_blocks=block_length is not None,
    )
    return float(nll.sum())


def log_conditional(oracle, x, given):
    """`log p(continuation | context)` by summing the joint distribution."""
    agrees = (oracle.sequences[:, :given] == torch.tensor(x[:given])).all(1)
    own = (oracle.sequences == torch.tensor(x)).all(1)
    return math.log(oracle.joint[own].sum() / oracle.joint[agrees].sum())


@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("schedule", [LOG_LINEAR, LogLinear(1e-3), Cosine()])
def test_an_oracle_has_its_exact_conditional_likelihood(given, schedule):
    """With exact conditionals every order gives the chain rule, so that the bound is tight: no schedule's matter."""
    oracle = Oracle(length=4)
    for x in ([0, 1, 2, 0], [2, 2, 1, 0]):
        assert bound(oracle, x, given, 15, schedule=schedule) == pytest.approx(-log_conditional(oracle, x, given))


@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("condition", [False, True])
def test_an_oracle_of_blocks_has_its_exact_conditional_likelihood(given, size, condition):
    oracle = BlockOracle(size, length=4)
    for x in ([0, 1, 2, 0], [2, 2, 1, 0]):
        assert bound(oracle, x, given, 15, condition=condition) == pytest.approx(-log_conditional(oracle, x, given))


def test_states_of_blocks_are_those_of_each():
    states = masked_states(7, 7, seed=0, key=1, start=2, block_length=3)  # one token, two blocks of three
    assert states.masked_KN.shape == (7, 7)
    assert states.weight_KN.sum(0).tolist() == pytest.approx([1.0] * 7)
    assert [len({tuple(row) for row in part.tolist()}) for part in states.masked_KN.split([1, 3, 3], 1)] == [2, 7, 7]


def test_states_are_all_sets_or_as_many_as_asked():
    few = masked_states(3, 7, seed=0, key=1)
    assert sorted(map(tuple, few.masked_KN.tolist())) == sorted(itertools.product([False, True], repeat=3))[1:]
    assert float(few.weight_KN.sum()) == pytest.approx(3), "each token counts once"
    many = masked_states(40, 80, seed=0, key=1)
    counts = many.masked_KN.sum(1)
    assert counts.sort().values.tolist() == [k for k in range(1, 41) for _ in range(2)], "stratified"
    assert torch.allclose(many.weight_KN, many.masked_KN * 40 / (80 * counts.double()[:, None]))
    again, other = masked_states(40, 80, seed=0, key=1), masked_states(40, 80, seed=0, key=2)
    assert torch.equal(many.masked_KN, again.masked_KN)
    assert not torch.equal(many.masked_KN, other.masked_KN)


def test_draws_are_unbiased_and_come_closer_with_their_number():
    oracle = Oracle(length=5, tokens=2, seed=3)
    x, exact = [0, 1, 1, 0, 1], -log_conditional(oracle, [0, 1, 1, 0, 1], 1)
    spread = []
    for draws in (3, 12):  # there are 15 states
        found = torch.tensor([bound(oracle, x, 1, draws, key=key) for key in range(300)])
        stderr = float(found.std()) / math.sqrt(len(found))
        assert abs(float(found.mean()) - exact) < 4 * stderr
        spread.append(float(found.std()))
    assert spread[1] < 0.7 * spread[0]


class Conditioned(Oracle):
    """Predicts uniformly until it has an estimate, and only the context's and the true tokens' own with a right one."""

    def weighted_nll(self, state, x_BL, weight_BL):
        if state.estimate_BLD is None:
            nll = torch.where(state.z_BL == self.mask_id, math.log(self.tokens), 0.0)
            return (nll * weight_BL).sum(), nll
        assert torch.equal(state.estimate_BLD, self.estimate(state)), (
            "the estimate is that of a first pass on the same state"
        )
        return super().weighted_nll(state, x_BL, weight_BL)


def test_the_estimate_of_a_first_pass():
    oracle, x = Conditioned(length=4), [0, 1, 2, 0]
    assert bound(oracle, x, 1, 7) == pytest.approx(3 * math.log(3))
    assert bound(oracle, x, 1, 7, condition=True) == pytest.approx(-log_conditional(oracle, x, 1))


def greedy_by_hand(oracle, context, n, tail):
    """The most confident first, by the definition; positions of the tail stay masked."""
    z = [*context, *[oracle.mask_id] * (n + tail)]
    while oracle.mask_id in z[len(context) : len(context) + n]:
        p = oracle.conditionals(torch.tensor([z]))[0]
        open_ = [i for i in range(len(context), len(context) + n) if z[i] == oracle.mask_id]
        best = max(open_, key=lambda i: float(p[i].max()))
        z[best] = int(p[best].argmax())
    return z[: len(context) + n]


@pytest.mark.parametrize("tail", [0, 1])
def test_only_the_greedy_continuation_agrees(tail):
    oracle = Oracle(length=4, seed=5)
    n = 3 - tail
    for first in range(3):
        greedy = greedy_by_hand(oracle, [first], n, tail)
        rows = torch.tensor([[first, *c, *[0] * tail] for c in itertools.product(range(3), repeat=n)])
        at = torch.arange(4)
        asked, hidden = ((at >= 1) & (at < 4 - tail)).expand_as(rows), (at >= 4 - tail).expand_as(rows)
        found = greedy_agrees(oracle, rows, asked, hidden, schedule=LOG_LINEAR, mask_id=oracle.mask_id, carry=False)
        assert found.tolist() == [row[: 4 - tail].tolist() == greedy for row in rows]


def test_greedy_decoding_carries_the_estimate_of_the_step_before():
    oracle = Oracle(length=3, seed=5)
    greedy = torch.tensor([greedy_by_hand(oracle, [], 3, 0)])
    everything, nothing = torch.ones_like(greedy, dtype=torch.bool), torch.zeros_like(greedy, dtype=torch.bool)
    oracle.estimates, oracle.evaluations = [], 0
    assert greedy_agrees(
        oracle, greedy, everything, nothing, schedule=LOG_LINEAR, mask_id=oracle.mask_id, carry=True
    ).all()
    assert oracle.evaluations == 3
    first, second, third = oracle.estimates
    assert first is None
    start = oracle.conditionals(torch.full((1, 3), oracle.mask_id))
    p = start[0].max(1).values.argmax()
    assert torch.allclose(second[0, p], oracle.embed(greedy[0, p])), "a revealed token is its own estimate"
    assert torch.allclose(second[0, [i for i in range(3) if i != p]], start[0, [i for i in range(3) if i != p]])
    assert third.shape == second.shape
