"""The dense baselines compute the same results as scmdm, without which ratios would be meaningless."""

import pytest
import torch

from benchmarks.baselines import published_step
from benchmarks.baselines.dense import DenseDenoiser, sample_dense
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import State
from scmdm.models.dit import DiT, DiTConfig
from tests.diffusion.oracle import Oracle
from tests.diffusion.test_sampler import chi_squared, exact_distribution

VOCAB = 40


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = DiTConfig(width=16, layers=1, heads=2, self_conditioned=True)
    model = DiT(config, vocab_size=VOCAB, mask_id=VOCAB - 1, schedule=LogLinear())
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" not in name else 1.0)
    model.rotary_emb.reset_parameters()
    return model.eval()


def test_dense_objective_and_estimate_are_ours(model):
    x = torch.randint(0, VOCAB - 1, (3, 12))
    z = torch.where(torch.rand(3, 12) < 0.6, VOCAB - 1, x)
    t, weight, estimate = torch.full((3,), 0.6).double(), torch.rand(3, 12), torch.randn(3, 12, 16)
    dense, gradients = DenseDenoiser(model), []
    for denoiser in (dense, model):
        total, nll = denoiser.weighted_nll(State(z, t, estimate), x, weight)
        gradients.append((total.detach(), nll, *torch.autograd.grad(total, list(model.parameters()))))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # gradients of float32 sums
    ours, theirs = model.estimate(State(z, t, estimate)), dense.estimate(State(z, t, estimate))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("carry", "cached"), [(False, False), (False, True), (True, False)])
def test_dense_sampler_has_the_distribution_of_ours(carry, cached):
    """Of the exact enumeration that scmdm's own sampler is tested against; the oracle ignores what is carried."""
    oracle, steps = Oracle(), 5

    def log_p(state):
        return oracle.conditionals(state.z_BL).log().float()

    start = torch.full((20_000, oracle.length), oracle.mask_id)
    tokens = sample_dense(
        log_p,
        lambda p: p,
        start,
        LogLinear(),
        steps,
        mask_id=oracle.mask_id,
        carry=carry,
        cached=cached,
        generator=torch.Generator().manual_seed(0),
    )
    assert chi_squared(oracle, tokens, exact_distribution(oracle, LogLinear(), SamplerSettings(steps=steps))) > 1e-3


def test_the_published_step_is_subs_and_trains():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    z = torch.tensor([[6, 0, 6, 3, 6], [1, 6, 2, 6, 5]])
    found = published_step.log_probabilities(logits.clone(), z, 6)
    torch.testing.assert_close(found[z == 6][:, :6], logits[z == 6][:, :6].log_softmax(1))
    given = z != 6
    assert bool((found[given].gather(1, z[given][:, None]) == 0).all()) and bool((found[z == 6][:, 6] < -1e5).all())
    torch.manual_seed(0)
    config = DiTConfig(width=16, layers=2, heads=2, condition_width=8)
    step = published_step.make_published_step(config, 7, torch.randint(0, 2, (8, 5)), lr=1e-2)
    losses = [step() for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])
