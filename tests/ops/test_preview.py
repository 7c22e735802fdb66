"""The most probable tokens, sought along the principal axes of the output head."""

import re

import pytest
import torch

from scmdm.config.loading import load_config
from scmdm.config.model import ModelConfig
from scmdm.config.run import RunConfig
from scmdm.diffusion.schedule import LogLinear
from scmdm.errors import UserError
from scmdm.models.dit import DiT
from scmdm.models.flops import step_flops
from scmdm.models.initialization import init_weights
from scmdm.ops import output_head_cpu, output_head_gpu
from scmdm.ops import top_k as top_k_ops
from scmdm.ops.output_head import expected_embedding
from scmdm.ops.preview import Preview
from scmdm.ops.subs_logits import subs_bias
from tests.config.test_config import REQUIRED

VOCAB, WIDTH, RANK, MASK = 9001, 32, 8, 7


@pytest.fixture
def head():
    """States, weight, bias, embedding: a head whose axes have powers that fall, as those of trained ones do."""
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q
    weight = torch.randn(VOCAB, WIDTH, generator=g) * torch.logspace(0.5, -4, WIDTH) @ axes.T
    embedding = torch.randn(VOCAB, WIDTH, generator=g)
    return torch.randn(300, WIDTH, generator=g), weight + 0.5, torch.randn(VOCAB, generator=g), embedding


def test_axes_are_those_of_the_weights_about_their_mean(head):
    weight = head[1]
    preview = Preview.of(weight, RANK)
    torch.testing.assert_close(preview.axes_DR.T @ preview.axes_DR, torch.eye(RANK), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(preview.weight_VR, weight @ preview.axes_DR)
    centred = weight - weight.mean(0)
    best = torch.linalg.svd(centred, full_matrices=False).Vh[:RANK].T
    assert (centred @ preview.axes_DR).norm() >= 0.999 * (centred @ best).norm()
    assert Preview.of(torch.zeros(100, WIDTH), RANK).weight_VR.abs().max() == 0  # a new head


@pytest.mark.parametrize("kernels", [output_head_cpu, output_head_gpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_estimate_of_nearly_the_same_tokens(head, kernels, dtype):
    h, weight, bias, embedding = head
    given = (h.to(dtype), weight, subs_bias(bias, MASK), embedding)
    exact = kernels.estimate_of_best(*given, 4, None, chunk=100)
    found = kernels.estimate_of_best(*given, 4, RANK, chunk=100)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    same = ((found - exact).norm(dim=1) < (1e-4 if dtype == torch.float32 else 0.05) * exact.norm(dim=1)).float().mean()
    assert 0.9 < same <= 1, same  # all four tokens, by their true logits
    assert (found - exact).norm() < 0.1 * exact.norm()
    one = kernels.estimate_of_best(*given, 4, 1, chunk=100)  # along one axis they are not found
    assert (one - exact).norm() > 0.3 * exact.norm()


def test_chunks_change_nothing(head, monkeypatch):
    monkeypatch.setattr(top_k_ops, "_PREVIEWED", 200)
    h, weight, bias, embedding = head
    given = (subs_bias(bias, MASK), embedding, 4, RANK)
    with torch.no_grad():
        found = [output_head_gpu.estimate_of_best(h, weight, *given, chunk=chunk) for chunk in (64, 8192)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [RANK, WIDTH, 1000])
def test_few_positions_and_many_axes_take_all_logits(head, rank):
    h, weight, bias, embedding = head
    few = h[:8] if rank == RANK else h
    given = {"mask_id": MASK, "chunk": 512, "top_k": 4}
    with torch.no_grad():
        assert Preview.where_it_pays(weight, rank, len(few)) is None
        expected = expected_embedding(few, weight, bias, embedding, **given)
        assert torch.equal(expected_embedding(few, weight, bias, embedding, rank=rank, **given), expected)


def test_a_small_vocabulary_has_them_all_among_its_candidates():
    g = torch.Generator().manual_seed(1)
    h, weight, embedding = (torch.randn(n, WIDTH, generator=g) for n in (200, 12, 12))
    bias = subs_bias(torch.zeros(12), MASK)
    exact = output_head_cpu.estimate_of_best(h, weight, bias, embedding, 16, None, chunk=100)
    torch.testing.assert_close(output_head_cpu.estimate_of_best(h, weight, bias, embedding, 16, 4, chunk=100), exact)


def test_a_model_seeks_its_estimate_as_it_is_configured():
    def estimate(**keys):
        config = ModelConfig(width=WIDTH, layers=1, heads=2, self_conditioned=True, **keys)
        model = DiT(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
        init_weights(model, 0)
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            model.output_layer.linear.weight.copy_(torch.randn(VOCAB, WIDTH, generator=g))  # all axes alike
            return model.expected_embedding(torch.randn(300, WIDTH, generator=g))

    best = estimate(estimate_top_k=4)
    assert (estimate(estimate_top_k=4, estimate_rank=2) - best).norm() > 0.3 * best.norm()
    torch.testing.assert_close(estimate(estimate_top_k=4, estimate_rank=WIDTH), best)


def test_axes_without_a_number_of_tokens_are_a_mistake():
    keys = [*REQUIRED, "model.estimate_rank=8"]
    with pytest.raises(UserError, match=re.escape("model.estimate_rank=8 is not possible; it must be set with")):
        load_config(RunConfig, None, keys)
    assert load_config(RunConfig, None, [*keys, "model.estimate_top_k=4"]).model.estimate_rank == 8


def test_its_products_are_counted():
    every, best, sought, at_all = (
        step_flops(ModelConfig(self_conditioned=True, **keys), 50_258, 32, LogLinear(), passes=1).estimate_passes
        for keys in (
            {},
            {"estimate_top_k": 16},
            {"estimate_top_k": 16, "estimate_rank": 32},
            {"estimate_top_k": 16, "estimate_rank": 999},
        )
    )
    assert at_all == best
    assert sought - (2 * best - every) == pytest.approx((every - best) / 4)  # a quarter of 128
