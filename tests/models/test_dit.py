"""The DiT: equality with its base at the start of an adaptation, attention kernels, names of weights."""

import pytest
import torch

from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.errors import UserError
from scmdm.models.attention import attend, check_backend, choose_backend
from scmdm.models.conditioner import CONDITIONERS
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.rotary import rotate
from tests.weights import load_weights

MASK, VOCAB = 12, 13


def build(conditioned, **overrides):
    config = DiTConfig(width=32, layers=2, heads=4, condition_width=8, self_conditioned=conditioned, **overrides)
    model = DiT(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    return model


def trained_base(conditioned=False, **overrides):
    """A model, vanilla unless told otherwise, whose every parameter is away from its initial value."""
    model = build(conditioned, **overrides)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model


def adapted(base, kind, **overrides):
    model = build(True, conditioner=kind, **overrides)
    load_weights(model, dict(base.named_parameters()), "base", new_conditioner=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONDITIONERS)
def test_adapted_model_equals_its_base_bitwise(kind, dtype):
    base = trained_base()
    model = adapted(base, kind)
    z = torch.randint(0, VOCAB, (8, 16))
    t = torch.rand(8).double()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        expected = base.hidden(State(z, t))
        assert torch.equal(model.hidden(State(z, t)), expected)
        for scale in (0.0, 1.0, 100.0):
            assert torch.equal(model.hidden(State(z, t, scale * torch.randn(8, 16, 32))), expected)
    torch.testing.assert_close(model.logits(expected[0]), base.logits(expected[0]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_conditioner_learns_from_the_first_step(kind):
    model = adapted(trained_base(), kind)
    x = torch.randint(0, MASK, (16, 16))
    batch = noise_batch(
        Sequences(x, torch.ones_like(x).bool(), torch.arange(16)),
        torch.linspace(0.1, 1, 16).double(),
        schedule=LogLinear(),
        mask_id=MASK,
        seed=0,
        step=0,
        rate=1.0,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    self_conditioned_nelbo(model, batch, LogLinear(), condition=True).loss.backward()
    gradients = {n: float(p.grad.abs().sum()) for n, p in model.conditioner.named_parameters()}
    assert max(gradients.values()) > 0
    optimizer.step()
    optimizer.zero_grad()
    estimate = torch.randn(2, 16, 32)
    assert not torch.equal(model.hidden(State(x[:2], batch.t[:2], estimate)), model.hidden(State(x[:2], batch.t[:2])))
    # From the second step on every factor has a gradient: exactly one started at zero.
    self_conditioned_nelbo(model, batch, LogLinear(), condition=True).loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.conditioner.parameters())


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_the_null_estimate_adds_exactly_nothing(kind):
    model = adapted(trained_base(), kind)
    with torch.no_grad():
        for parameter in model.conditioner.parameters():
            parameter.normal_()
    z, t = torch.randint(0, VOCAB, (4, 16)), torch.rand(4).double()
    assert torch.equal(model.hidden(State(z, t, torch.zeros(4, 16, 32))), model.hidden(State(z, t)))


@pytest.mark.parametrize("length", [8, 300])
def test_attention_backends_agree(length):
    q, k, v = (torch.randn(2, length, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    torch.testing.assert_close(attend(q, k, v, "matmul"), attend(q, k, v, "sdpa"), rtol=1e-5, atol=1e-5)
    assert choose_backend("auto", "cpu", torch.bfloat16, length) == ("matmul" if length == 8 else "sdpa")
    assert choose_backend("auto", "cpu", torch.float32, length) == "sdpa"


def test_flash_attention_is_refused_where_it_cannot_run():
    with pytest.raises(UserError, match=r"model\.attention=flash cannot run: .*CUDA"):
        check_backend("flash", "cpu", torch.bfloat16)


def test_attention_is_bidirectional_and_knows_positions():
    model = trained_base()
    z, t = torch.randint(0, VOCAB, (1, 16)), torch.ones(1).double()
    later = z.clone()
    later[0, 15] = (later[0, 15] + 1) % VOCAB
    assert not torch.equal(model.hidden(State(z, t))[0, 0], model.hidden(State(later, t))[0, 0])
    twice = torch.full((1, 16), 3)
    twice[0, 5] = 4
    hidden = model.hidden(State(twice, t))[0]
    assert not torch.allclose(hidden[0], hidden[1], atol=1e-4)


def test_positions_need_one_token_that_differs():
    """Rotary attention over equal tokens is the same everywhere: an all-mask state has no positions, and one given
    token (the beginning) gives it all of them. That is why `bos_policy=given` is the default."""
    model, t = trained_base(), torch.ones(1).double()
    blind = torch.full((1, 16), MASK)
    seeing = blind.clone()
    seeing[0, 0] = 3
    hidden, seen = model.hidden(State(blind, t))[0], model.hidden(State(seeing, t))[0]
    assert torch.allclose(hidden, hidden[:1].expand_as(hidden), atol=1e-5)
    assert torch.pdist(seen).min() > 1e-4


def test_time_conditioning_is_a_setting():
    z = torch.randint(0, VOCAB, (2, 16))
    early, late = torch.full((2,), 0.9).double(), torch.full((2,), 0.1).double()
    blind, seeing = trained_base(), trained_base(time_conditioning=True)
    assert torch.equal(blind.hidden(State(z, early)), blind.hidden(State(z, late)))
    assert not torch.equal(seeing.hidden(State(z, early)), seeing.hidden(State(z, late)))
    assert torch.isfinite(seeing.hidden(State(z, torch.ones(2).double()))).all(), "alpha_1 = 0 has a finite noise level"


def test_rotary_is_the_half_split_rotation():
    """Against complex multiplication: pair (k, k + K/2) at position l turns by l * 10000^(-2k/K)."""
    table = trained_base().rotary_emb(5)
    x, d = torch.randn(2, 5, 3, 8).requires_grad_(), torch.randn(2, 5, 8, 3)
    angle = torch.outer(torch.arange(5).float(), 10_000 ** (-torch.arange(0, 8, 2).float() / 8))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    # Compiled, and on a GPU, halves stay where they are; a CPU leaves pairs side by side.
    (halves,) = torch.compile(rotate, backend="eager", fullgraph=True)(table, x)
    torch.testing.assert_close(halves, torch.cat([turned.real, turned.imag], -1))
    expected = torch.view_as_real(turned).flatten(-2)
    for given in (table, table.expand(2, -1, -1, -1)):
        (found,) = rotate(given, x)
        torch.testing.assert_close(found, expected)
        for gradient in (d.transpose(-1, -2), d.transpose(-1, -2).contiguous()):
            back = [torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for y in (found, expected)]
            torch.testing.assert_close(*back)
    (rounded,) = rotate(table, x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, rtol=2e-2, atol=2e-2)


def test_wrong_weights_are_named():
    base = trained_base()
    weights = dict(base.named_parameters())
    with pytest.raises(UserError, match=r"lacks blocks\.0\.norm1\.weight"):
        load_weights(build(False), {n: w for n, w in weights.items() if n != "blocks.0.norm1.weight"}, "file")
    with pytest.raises(UserError, match=r"has extra"):
        load_weights(build(False), {**weights, "extra": torch.zeros(1)}, "file")
    with pytest.raises(UserError, match=r"vocab_embed\.embedding has shape \(2, 2\)"):
        load_weights(build(False), {**weights, "vocab_embed.embedding": torch.zeros(2, 2)}, "file")


def gradients_and_kept_bytes(kind, dropout):
    """Of one training pass in float32: every gradient, and what autograd holds between forward and backward."""
    model = build(True, dropout=dropout, activation_checkpointing=kind).train()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    x = torch.randint(0, VOCAB - 1, (4, 16), generator=torch.Generator().manual_seed(1))
    z = x.masked_fill(torch.arange(16) % 2 == 0, MASK)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model.weighted_nll(State(z, torch.ones(4).double(), torch.ones(4, 16, 32)), x, torch.ones(4, 16))
    held = sum(kept.values())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, held


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(kind, dropout):
    plain, held = gradients_and_kept_bytes("none", dropout)
    ours, fewer = gradients_and_kept_bytes(kind, dropout)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert fewer < 0.8 * held


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_in_bfloat16_with_both_passes_gives_the_same_gradients(kind):
    """Autocast keeps weights that the estimate's pass has cast; what is made again must not depend on that."""
    assert all(map(torch.equal, bfloat16_gradients(kind), bfloat16_gradients("none")))


def bfloat16_gradients(kind):
    model = adapted(trained_base(), "projection", activation_checkpointing=kind).train()
    x = torch.randint(0, MASK, (4, 16), generator=torch.Generator().manual_seed(1))
    draws = {"schedule": model.schedule, "mask_id": MASK, "seed": 0, "step": 0, "rate": 1.0}
    batch = noise_batch(
        Sequences(x, torch.ones_like(x).bool(), torch.arange(4)), torch.full((4,), 0.5).double(), **draws
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = self_conditioned_nelbo(model, batch, model.schedule, condition=True).loss
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_a_modulation_that_all_sequences_share_is_that_of_each():
    """One sequence has it in the weights of norms and gates, two have it beside their activations."""
    config = DiTConfig(width=32, layers=2, heads=2, time_conditioning=True)
    model = DiT(config, vocab_size=20, mask_id=19, schedule=LogLinear())
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    z = torch.randint(0, 20, (1, 9), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3], dtype=torch.float64)
    both = model.hidden(State(z.expand(2, -1), t.expand(2)))
    torch.testing.assert_close(model.hidden(State(z, t)).expand(2, -1, -1), both, rtol=1e-4, atol=1e-5)
