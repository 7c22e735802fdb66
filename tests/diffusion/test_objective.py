"""The objective against exact enumeration and against an independent formula."""

import math

import pytest
import torch

from scmdm.diffusion.likelihood import nelbo_of, nelbo_terms
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear, make_schedule
from scmdm.diffusion.state import Sequences, State
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from tests.diffusion.oracle import Oracle


def make_batch(x, t, rate=1.0, seed=0, mask_id=9):
    return noise_batch(
        Sequences(x, torch.ones_like(x).bool(), torch.arange(len(x))),
        t,
        schedule=LogLinear(),
        mask_id=mask_id,
        seed=seed,
        step=0,
        rate=rate,
    )


def small_model(rate=1.0, **overrides):
    config = DiTConfig(width=16, layers=2, heads=2, condition_width=8, self_conditioned=rate > 0, **overrides)
    model = DiT(config, vocab_size=10, mask_id=9, schedule=LogLinear())
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model


@pytest.mark.parametrize(
    "schedule", [LogLinear(), make_schedule("cosine"), make_schedule("polynomial", power=2)], ids=str
)
def test_nelbo_of_the_oracle_is_the_entropy(schedule):
    """With exact conditionals the NELBO is tight for any schedule: its mean over data is the entropy of the joint."""
    oracle = Oracle()
    generator = torch.Generator().manual_seed(0)
    rows = torch.multinomial(oracle.joint, 20000, replacement=True, generator=generator)
    x = oracle.sequences[rows]
    batches = [Sequences(x, torch.ones_like(x).bool(), torch.arange(len(x)))]
    result = nelbo_of(nelbo_terms(oracle, batches, schedule, mask_id=oracle.mask_id, seed=0, t_min=1e-3, draws=4))
    entropy = float(-(oracle.joint * oracle.joint.log()).sum()) / oracle.length
    assert abs(result.mean - entropy) < 3.5 * result.stderr
    assert result.stderr < 0.02 * entropy


def test_nelbo_equals_the_straightforward_formula():
    """Dense logits, log-softmax over all positions, 1/t, sum over masked: the textbook form in float32."""
    model, x = small_model().eval(), torch.randint(0, 9, (32, 12), generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.05, 1, 32, dtype=torch.float64)
    batch = make_batch(x, t)
    ours = self_conditioned_nelbo(model, batch, LogLinear(), condition=False)

    hidden = model.hidden(State(batch.z, t))
    logits = hidden @ model.output_layer.linear.weight.T + model.output_layer.linear.bias
    logits = torch.cat([logits[..., :9], torch.full_like(logits[..., 9:], -math.inf)], -1)
    log_p = logits.log_softmax(-1).gather(2, x[..., None]).squeeze(2)
    plain = (-(batch.z == 9).float() * log_p / t[:, None].float()).sum()
    torch.testing.assert_close(ours.loss, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.weighted_nll_B.sum().float(), plain, rtol=1e-5, atol=0)


def test_conditioned_pass_sees_the_expected_embedding():
    """Two passes by hand: null, dense softmax, `p @ E` at masks and `E[x]` elsewhere, then the conditioned loss."""
    model, x = small_model(), torch.randint(0, 9, (16, 12), generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.05, 1, 16, dtype=torch.float64)
    batch = make_batch(x, t)
    ours = self_conditioned_nelbo(model, batch, LogLinear(), condition=True)
    linear, embedding = model.output_layer.linear, model.vocab_embed.embedding

    def dense(hidden):
        return torch.cat([(hidden @ linear.weight.T + linear.bias)[..., :9], torch.full((16, 12, 1), -math.inf)], -1)

    p = dense(model.hidden(State(batch.z, t))).softmax(-1).detach()
    p = torch.where((batch.z == 9)[..., None], p, torch.nn.functional.one_hot(batch.z, 10).float())
    log_p = (
        dense(model.hidden(State(batch.z, t, (p @ embedding).detach())))
        .log_softmax(-1)
        .gather(2, x[..., None])
        .squeeze(2)
    )
    plain = (-(batch.z == 9).float() * log_p / t[:, None].float()).sum()
    torch.testing.assert_close(ours.loss, plain, rtol=1e-5, atol=0)
    assert ours.passes == 2
    ours_gradients = torch.autograd.grad(ours.loss, list(model.parameters()), retain_graph=True)
    plain_gradients = torch.autograd.grad(plain, list(model.parameters()))
    for a, b in zip(ours_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Counting:
    """Counts the passes of a model and records what they were given."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def lower(self, state, *, dropout=False):
        self.calls.append(("lower", state.z_BL, state.estimate_BLD, torch.is_grad_enabled(), dropout))
        return self.model.lower(state, dropout=dropout)

    def estimate(self, state, *, dropout=False):
        self.calls.append(("estimate", state.z_BL, state.estimate_BLD, torch.is_grad_enabled(), dropout))
        return self.model.estimate(state, dropout=dropout)

    def weighted_nll(self, state, x, weight):
        self.calls.append(("nll", state.z_BL, state.estimate_BLD, torch.is_grad_enabled(), None))
        return self.model.weighted_nll(state, x, weight)


def test_rate_zero_skips_pass_one_and_rate_decides_per_sample():
    x, t = torch.randint(0, 9, (64, 6)), torch.full((64,), 0.5).double()
    vanilla = Counting(small_model())
    self_conditioned_nelbo(vanilla, make_batch(x, t, rate=0.0), LogLinear(), condition=False)
    assert [call[0] for call in vanilla.calls] == ["nll"] and vanilla.calls[0][2] is None

    half = Counting(small_model())
    batch = make_batch(x, t, rate=0.5)
    self_conditioned_nelbo(half, batch, LogLinear(), condition=True)
    assert [(call[0], call[3]) for call in half.calls] == [("estimate", False), ("nll", True)]
    given = half.calls[1][2].abs().sum((1, 2)) > 0
    assert torch.equal(given, batch.conditioned) and 0 < int(given.sum()) < 64


def test_passes_see_the_state_of_the_loss():
    x, t = torch.randint(0, 9, (8, 6)), torch.full((8,), 0.5).double()
    counting, batch = Counting(small_model()), make_batch(x, t)
    output = self_conditioned_nelbo(counting, batch, LogLinear(), condition=True, passes=3, estimate_dropout=False)
    assert output.passes == 4
    assert [call[0] for call in counting.calls] == ["estimate"] * 3 + ["nll"]
    assert counting.calls[0][2] is None and counting.calls[1][2] is not None
    assert all(call[4] is False for call in counting.calls[:3])
    assert all(torch.equal(call[1], batch.z) for call in counting.calls)


def test_dropout_in_the_estimate_is_a_setting():
    model = small_model(dropout=0.5).train()
    z, t = torch.full((4, 6), 9), torch.ones(4).double()
    torch.manual_seed(0)
    first, second = (model.estimate(State(z, t), dropout=True) for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.estimate(State(z, t), dropout=False) for _ in range(2))
    assert torch.equal(first, second)


def test_more_draws_shrink_the_spread_not_the_mean():
    model, x = small_model().eval(), torch.randint(0, 9, (512, 8), generator=torch.Generator().manual_seed(0))
    batches = [Sequences(x, torch.ones_like(x).bool(), torch.arange(512))]
    few = nelbo_of(nelbo_terms(model, batches, LogLinear(), mask_id=9, seed=0, t_min=1e-3, draws=1))
    many = nelbo_of(nelbo_terms(model, batches, LogLinear(), mask_id=9, seed=1, t_min=1e-3, draws=16))
    assert many.stderr < 0.5 * few.stderr
    assert abs(many.mean - few.mean) < 4 * few.stderr
    assert many.perplexity == pytest.approx(math.exp(many.mean))
