"""Packed documents do not attend to each other: logits equal those of each document alone."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from scmdm.diffusion.likelihood import nelbo_of, nelbo_terms
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.packing import document_starts, make_packing
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.errors import UserError
from scmdm.models import attention as attention_module
from scmdm.models.attention import attend, check_backend, masks_of
from tests.models.test_dit import MASK, adapted, trained_base

LENGTHS = (5, 1, 7, 3)
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
SPANS = [(sum(LENGTHS[:n]), sum(LENGTHS[: n + 1])) for n in range(len(LENGTHS))]
TIME = torch.full((1,), 0.5).double()


def noised(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, MASK, (1, sum(LENGTHS)), generator=generator)
    return x, x.masked_fill(torch.rand(x.shape, generator=generator) < 0.5, MASK)


def test_by_hand():
    packing = make_packing(torch.tensor([[0, 0, 1, 1, 1, 2]]))
    assert packing.positions_BL.tolist() == [[0, 1, 0, 1, 2, 0]]
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 1)).bool()
    assert torch.equal(packing.allowed_B1LL[0, 0], blocks)
    assert document_starts(torch.tensor([[3, 3, 4], [0, 1, 2]])).tolist() == [[True, False, True], [True] * 3]


@pytest.fixture(autouse=True)
def kernels_of_documents(monkeypatch):
    """In place of flash-attn's and torch's, which need a GPU: the same call, one document after the other."""

    def kernel(q, k, v, bounds_q, bounds_k, longest_q, longest_k):
        assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k)
        assert longest_q == longest_k >= bounds_q.diff().max()
        pieces = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in pairwise(bounds_q)]
        options = {"enable_gqa": q.shape[1] != k.shape[1]}
        out = [torch.nn.functional.scaled_dot_product_attention(*own, **options) for own in pieces]
        return torch.cat([piece.transpose(0, 1) for piece in out])

    monkeypatch.setattr(attention_module, "_flash_varlen", lambda: kernel)
    monkeypatch.setattr(attention_module, "_torch_varlen", lambda *, grouped: kernel)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "varlen"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_logits_are_those_of_each_document_alone(attention, conditioned):
    model = trained_base(attention=attention)
    if conditioned:
        model = adapted(model, "projection", attention=attention)
        for parameter in model.conditioner.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    _, z = noised()
    packing, estimate = make_packing(DOCUMENTS), None
    if conditioned:
        estimate = model.estimate(State(z, TIME, packing=packing))
    together = model.logits(model.hidden(State(z, TIME, estimate, packing=packing))[0])
    for start, end in SPANS:
        own = model.estimate(State(z[:, start:end], TIME)) if conditioned else None
        alone = model.logits(model.hidden(State(z[:, start:end], TIME, own))[0])
        torch.testing.assert_close(together[start:end], alone, rtol=1e-5, atol=1e-5)


def test_nothing_leaks_in_either_direction():
    model, (_, z), packing = trained_base(), noised(), make_packing(DOCUMENTS)
    before = model.hidden(State(z, TIME, packing=packing))[0]
    for start, end in SPANS:
        changed = z.clone()
        changed[0, start:end] = (changed[0, start:end] + 1) % MASK
        after = model.hidden(State(changed, TIME, packing=packing))[0]
        outside = torch.ones(z.shape[1]).bool()
        outside[start:end] = False
        assert torch.equal(after[outside], before[outside])
        assert not torch.equal(after[start:end], before[start:end])


def test_without_packing_they_do_see_each_other():
    model, (_, z) = trained_base(), noised()
    packed = model.hidden(State(z, TIME, packing=make_packing(DOCUMENTS)))
    assert not torch.allclose(packed, model.hidden(State(z, TIME)), atol=1e-3)
    one = make_packing(torch.zeros_like(DOCUMENTS))
    torch.testing.assert_close(model.hidden(State(z, TIME, packing=one)), model.hidden(State(z, TIME)))


@pytest.mark.parametrize("attention", ["auto", "varlen"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_loss_and_gradients_of_both_passes_are_those_of_the_documents(checkpointing, attention):
    """The same noise on the packed sample and on its documents, each a sample of its own."""
    model = adapted(trained_base(), "projection", activation_checkpointing=checkpointing, attention=attention)
    x, _ = noised()
    draws = {"schedule": LogLinear(), "mask_id": MASK, "seed": 0, "step": 0, "rate": 1.0}
    batch = noise_batch(Sequences(x, torch.ones_like(x).bool(), torch.arange(1), DOCUMENTS), TIME, **draws)
    packed = self_conditioned_nelbo(model, batch, LogLinear(), condition=True)
    packed.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for start, end in SPANS:
        own = noise_batch(Sequences(x[:, start:end], torch.ones(1, end - start).bool(), torch.arange(1)), TIME, **draws)
        z = batch.z[:, start:end]
        own = dataclasses.replace(own, z=z)
        output = self_conditioned_nelbo(model, own, LogLinear(), condition=True)
        output.loss.backward()
        total += float(output.loss)
    assert float(packed.loss) == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_validation_takes_the_numbers_of_the_documents():
    model, (x, _) = trained_base(), noised()
    valid, ids = torch.ones_like(x).bool(), torch.arange(1)
    options = {"mask_id": MASK, "seed": 0, "t_min": 1e-3, "draws": 2}
    apart = nelbo_of(nelbo_terms(model, [Sequences(x, valid, ids, DOCUMENTS)], LogLinear(), **options))
    one = nelbo_of(nelbo_terms(model, [Sequences(x, valid, ids, torch.zeros_like(DOCUMENTS))], LogLinear(), **options))
    blind = nelbo_of(nelbo_terms(model, [Sequences(x, valid, ids)], LogLinear(), **options))
    assert one.mean == pytest.approx(blind.mean, rel=1e-5) and apart.mean != pytest.approx(blind.mean, rel=1e-3)


def test_bounds_of_a_batch():
    packing = make_packing(torch.tensor([[3, 3, 4, 4], [4, 5, 5, 5], [0, 0, 0, 0]]))
    assert packing.bounds_C.tolist() == [0, 2, 4, 5, 8, 12], "the same number in two samples is two documents"


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_kernels_of_documents_agree_in_a_batch(kv_heads):
    heads = (2, kv_heads, kv_heads)
    q, k, v = (torch.randn(3, 4, n, 8, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(heads))
    packing = make_packing(torch.tensor([[3, 3, 4, 4], [4, 5, 5, 5], [0, 0, 0, 0]]))
    expected = attend(q, k, v, "sdpa", packing.allowed_B1LL)
    for backend in ("varlen", "flash"):
        masks = masks_of(packing, backend)
        torch.testing.assert_close(attend(q, k, v, backend, masks.allowed, masks.bounds_C), expected)


def test_a_kernel_that_cannot_run_is_refused():
    with pytest.raises(UserError, match="packed samples needs a CUDA device"):
        check_backend("varlen", "cpu", torch.bfloat16)


def test_varlen_is_auto_where_nothing_is_packed():
    q = torch.randn(1, 16, 2, 8)
    assert torch.equal(attend(q, q, q, "varlen"), attend(q, q, q, "auto"))
