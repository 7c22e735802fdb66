"""What the settings of an ablation do, each against an independent computation."""

import pytest
import torch

from scmdm.diffusion.objective import clean_state_estimate, self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.flops import step_flops
from scmdm.models.initialization import init_weights
from scmdm.ops.output_head import expected_embedding
from scmdm.ops.top_k import top_tokens
from scmdm.training.step import train_step
from tests.training.test_step import make as make_engine

MASK = 9


def small_model(**overrides):
    """Every parameter away from its initial value."""
    config = DiTConfig(width=16, layers=2, heads=2, condition_width=8, self_conditioned=True, **overrides)
    model = DiT(config, vocab_size=10, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


def make_batch(rows=4, length=6, t=0.6):
    x = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(0))
    times = torch.full((rows,), t, dtype=torch.float64)
    draws = {"schedule": LogLinear(), "mask_id": MASK, "seed": 0, "step": 0, "rate": 1.0}
    return noise_batch(Sequences(x, torch.ones_like(x).bool(), torch.arange(rows)), times, **draws)


@pytest.fixture
def in_float64(monkeypatch):
    """All that is computed in float32 whatever the weights are, norms and logits, in float64 instead."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def slopes(function, model, h=1e-5):
    """Derivative of `function()` along one random direction of each parameter, by central differences."""
    found = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + index)).double()
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * h)
                values.append(float(function()))
        with torch.no_grad():
            parameter.add_(direction, alpha=h)
        found[name] = ((values[0] - values[1]) / (2 * h), direction)
    return found


@pytest.mark.parametrize(
    ("settings", "passes"),
    [({}, 1), ({"estimate_top_k": 3, "inject_at": "masked", "conditioner": "norm"}, 1), ({"conditioner": "mlp"}, 2)],
)
def test_without_stop_gradient_the_gradient_is_that_of_the_whole_loss(settings, passes, in_float64):
    """Float64 finite differences of the loss with the estimate made anew, and with the estimate held."""
    model, batch = small_model(head_chunk=5, **settings).double(), make_batch()
    held = clean_state_estimate(model, [State(batch.z, batch.t)] * passes, dropout=False)

    def whole():
        return self_conditioned_nelbo(model, batch, LogLinear(), condition=True, passes=passes).loss

    def with_the_estimate_held():
        weight = (1 / batch.t)[:, None] * batch.valid
        return model.weighted_nll(State(batch.z, batch.t, held), batch.x, weight)[0]

    expected = {}
    for stop_gradient, function in ((False, whole), (True, with_the_estimate_held)):
        model.zero_grad()
        options = {"condition": True, "passes": passes, "stop_gradient": stop_gradient}
        self_conditioned_nelbo(model, batch, LogLinear(), **options).loss.backward()
        expected[stop_gradient] = slopes(function, model)
        for name, (slope, direction) in expected[stop_gradient].items():
            gradient = float((model.get_parameter(name).grad * direction).sum())
            assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-6), (name, stop_gradient)
    apart = [abs(expected[False][name][0] - slope) > 1e-3 for name, (slope, _) in expected[True].items()]
    assert sum(apart) > len(apart) / 2


def test_the_step_lets_the_gradient_through_when_told(monkeypatch):
    gradients = []
    for stop_gradient in (True, False):
        engine, config = make_engine()
        config.self_conditioning.stop_gradient = stop_gradient
        # At the first step the conditioner is zero, and nothing comes back through it.
        with torch.no_grad():
            engine.model.conditioner.proj.weight.normal_(generator=torch.Generator().manual_seed(0))
            engine.model.output_layer.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(engine, "step", lambda skip: None)
        x = torch.randint(0, MASK, (64, 12), generator=torch.Generator().manual_seed(0))
        whole = Sequences(x, torch.ones_like(x).bool(), torch.arange(64))
        result = train_step(engine, config, LogLinear(), MASK, whole, 0)
        gradients.append((result.loss, engine.model.output_layer.linear.bias.grad.clone()))
    (loss, held), (same_loss, whole) = gradients
    assert loss == pytest.approx(same_loss, rel=1e-5) and not torch.allclose(held, whole, rtol=1e-3)


def test_an_estimate_with_a_gradient_costs_a_backward_pass():
    model, schedule = DiTConfig(self_conditioned=True), LogLinear()
    stopped, through = (step_flops(model, 34, 32, schedule, passes=2, stop_gradient=stop) for stop in (True, False))
    assert through.estimate_passes == 3 * stopped.estimate_passes and through.loss_pass == stopped.loss_pass


def test_a_conditioner_of_two_maps_costs_two_products():
    schedule = LogLinear()
    linear, mlp, plain = (
        step_flops(DiTConfig(self_conditioned=on, conditioner=kind), 34, 32, schedule, passes=0).forward
        for on, kind in ((True, "projection"), (True, "mlp"), (False, "projection"))
    )
    assert mlp - plain == 2 * (linear - plain) > 0


def test_only_the_most_probable_tokens_make_the_estimate():
    model = small_model(estimate_top_k=3)
    h = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    p = model.logits(h).softmax(1)
    kept = p * (p >= p.topk(3).values[:, -1:])
    expected = (kept / kept.sum(1, keepdim=True)) @ model.vocab_embed.embedding
    torch.testing.assert_close(model.expected_embedding(h), expected)
    for all_of_them in (10, 1000):  # the mask among them has no probability
        every = small_model(estimate_top_k=all_of_them)
        torch.testing.assert_close(every.expected_embedding(h), small_model().expected_embedding(h))


@pytest.mark.parametrize(("vocab", "k"), [(5, 8), (200, 3), (1003, 5), (50_258, 16)])
def test_the_most_probable_tokens_are_those_that_sorting_finds(vocab, k):
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab)).requires_grad_()
    expected = logits.topk(min(k, vocab), dim=1)
    values, ids = top_tokens(logits, k)
    assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)
    (gradient,) = torch.autograd.grad(values.square().sum(), logits)
    assert torch.equal(gradient.gather(1, ids), 2 * values) and gradient.count_nonzero() == values.numel()


@pytest.mark.parametrize("rows", [0, 1, 700])
def test_an_estimate_of_the_best_in_parts_is_that_with_a_gradient(rows):
    g = torch.Generator().manual_seed(rows)
    h, weight, bias, embedding = (torch.randn(*s, generator=g) for s in ((rows, 16), (9000, 16), (9000,), (9000, 16)))
    given = {"mask_id": 8999, "chunk": 512, "top_k": 4}
    with torch.no_grad():
        found = expected_embedding(h, weight, bias, embedding, **given)
    if rows:
        torch.testing.assert_close(found, expected_embedding(h.requires_grad_(), weight, bias, embedding, **given))
    assert found.shape == (rows, 16)


def test_injection_at_masked_positions_ignores_the_estimate_elsewhere():
    model, batch = small_model(inject_at="masked"), make_batch()
    estimate = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(3))
    masked = (batch.z == MASK)[..., None]
    given = model.hidden(State(batch.z, batch.t, estimate))
    assert torch.equal(given, model.hidden(State(batch.z, batch.t, estimate.masked_fill(~masked, 7.0))))
    assert not torch.equal(given, model.hidden(State(batch.z, batch.t, estimate.masked_fill(masked, 7.0))))
    everywhere = small_model()
    everywhere.load_state_dict(model.state_dict())
    torch.testing.assert_close(given, everywhere.hidden(State(batch.z, batch.t, estimate.masked_fill(~masked, 0.0))))


@pytest.mark.parametrize("settings", [{"estimate_top_k": 2}, {"inject_at": "masked"}, {"conditioner": "norm"}])
def test_sampling_carries_what_training_conditions_on(settings):
    """Two steps from a masked start: the second evaluation sees the estimate that pass 1 would make of the first."""
    model = small_model(**settings).eval()
    given, ids, seen = torch.full((8, 6), MASK), torch.arange(8), []
    hidden = model.hidden

    def record(state):
        seen.append(state)
        return hidden(state)

    model.hidden = record
    options = {"schedule": LogLinear(), "settings": SamplerSettings(steps=2, carry=True), "mask_id": MASK, "seed": 0}
    sample(model, given, ids, **options)
    del model.hidden
    first, second = seen
    assert first.estimate_BLD is None
    masked = (second.z_BL == MASK)[..., None]
    with torch.no_grad():
        expected = torch.where(masked, model.estimate(first), model.embed(second.z_BL))
    torch.testing.assert_close(second.estimate_BLD, expected)


def test_both_nelbos_use_the_settings_of_the_model():
    """The conditioned NELBO of a model with top-1 estimates, by hand; the null one does not know of them."""
    model, plain, batch = small_model(estimate_top_k=1).eval(), small_model().eval(), make_batch()
    masked = batch.z == MASK
    with torch.no_grad():
        best = model.logits(model.hidden(State(batch.z, batch.t))).argmax(-1)
        estimate = model.embed(torch.where(masked, best, batch.z))
        weight = (1 / batch.t)[:, None].float() * batch.valid
        expected, _ = model.weighted_nll(State(batch.z, batch.t, estimate), batch.x, weight)
        found = self_conditioned_nelbo(model, batch, LogLinear(), condition=True).loss
        null = [self_conditioned_nelbo(m, batch, LogLinear(), condition=False).loss for m in (model, plain)]
    torch.testing.assert_close(found, expected)
    assert torch.equal(*null) and not torch.equal(found, null[0])
