"""The chunked output head against the dense reference; no step allocates a (B, L, V) tensor."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.ops import output_head_cpu, output_head_gpu
from scmdm.ops.output_head import (
    dense_expected_embedding,
    dense_weighted_nll_sum,
    expected_embedding,
    weighted_nll_sum,
)
from scmdm.ops.subs_logits import subs_bias

N, D, V, MASK = 37, 8, 23, 11


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*s, generator=g, requires_grad=True) for s in ((N, D), (V, D), (V,)))
    x = torch.randint(0, V - 1, (N,), generator=g)
    return h, weight, bias, x + (x >= MASK), torch.rand(N, generator=g) * 5, torch.randn(V, D, generator=g)


@pytest.fixture(params=[V, 5, 1], ids=lambda width: f"tile-{width}")
def tile(request, monkeypatch):
    """One as on a GPU, several, and among them one that holds the mask alone."""
    monkeypatch.setattr("scmdm.ops.output_head_cpu._TILE", request.param)


def dense_logits(h, weight, bias):
    blocked = torch.zeros(V).index_fill(0, torch.tensor([MASK]), -math.inf)
    return h @ weight.T + bias + blocked


@pytest.mark.parametrize("chunk", [1, 5, N, 1000])
def test_loss_and_gradients_equal_the_dense_head(problem, chunk, tile):
    h, weight, bias, x, w, _ = problem
    total, nll = weighted_nll_sum(h, weight, bias, x, w, mask_id=MASK, chunk=chunk)
    expected, terms = dense_weighted_nll_sum(h, weight, bias, x, w, mask_id=MASK)
    torch.testing.assert_close(nll, terms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    assert not nll.requires_grad
    ours = torch.autograd.grad(3 * total, (h, weight, bias))
    theirs = torch.autograd.grad(3 * expected, (h, weight, bias))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert ours[2][MASK] == 0


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("chunk", [1, 5, N, 1000])
def test_expected_embedding_equals_the_dense_one(problem, chunk, top_k, gradients, tile):
    h, weight, bias, _, _, embedding = problem
    with torch.set_grad_enabled(gradients):
        ours = expected_embedding(h, weight, bias, embedding, mask_id=MASK, chunk=chunk, top_k=top_k)
    expected = dense_expected_embedding(h, weight, bias, embedding, mask_id=MASK, top_k=top_k)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ours.requires_grad == gradients


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", ["entropy", "top1"])
@pytest.mark.parametrize(("top_k", "chunk", "temperature"), [(None, 5, 1.0), (None, 1000, 0.3), (3, 5, 2.0)])
def test_the_confidence_is_that_of_all_logits(problem, kind, top_k, chunk, temperature, gradients, tile):
    h, weight, bias, _, _, embedding = problem
    options = {"mask_id": MASK, "top_k": top_k, "temperature": temperature}
    with torch.set_grad_enabled(gradients):
        ours = expected_embedding(h, weight, bias, embedding, chunk=chunk, confidence=kind, **options)
    logits = dense_logits(h, weight, bias)
    p = (torch.cat([logits[:, :MASK], logits[:, MASK + 1 :]], 1) / temperature).softmax(1)
    expected = p.amax(1) if kind == "top1" else 1 + torch.xlogy(p, p).sum(1) / math.log(p.shape[1])
    torch.testing.assert_close(ours[:, -1], expected, rtol=1e-5, atol=1e-5)
    alone = dense_expected_embedding(h, weight, bias, embedding, **options)
    torch.testing.assert_close(ours[:, :-1], alone, rtol=1e-5, atol=1e-5)
    both = dense_expected_embedding(h, weight, bias, embedding, confidence=kind, **options)
    torch.testing.assert_close(ours, both, rtol=1e-5, atol=1e-5)
    if gradients:
        through, plain = (torch.autograd.grad(x.sum(), (h, weight, bias)) for x in (ours[:, -1], expected))
        for a, b in zip(through, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", [output_head_cpu, output_head_gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["entropy", "top1"])
def test_a_certain_or_a_uniform_prediction_is_not_the_null_one(kernels, kind):
    """Confidence 0 is that of the null estimate; a uniform prediction has the least above it, a certain one 1."""
    bias = torch.zeros(70).index_fill(0, torch.tensor([MASK]), float("-inf"))
    weight, embedding = torch.zeros(70, 4), torch.ones(70, 4)
    weight[3] = 1e4
    found = kernels.estimate(torch.tensor([[0.0] * 4, [1.0] * 4]), weight, bias, embedding, kind, chunk=8)[:, -1]
    assert 0 < found[0] <= 1 / 69 + 1e-6 and found[1] == 1
    assert kernels.estimate(torch.zeros(0, 4), weight, bias, embedding, kind, chunk=8).shape == (0, 5)


def test_the_reference_is_softmax_without_the_mask(problem):
    h, weight, bias, x, w, embedding = (t.detach() for t in problem)
    logits = dense_logits(h, weight, bias)
    total, terms = dense_weighted_nll_sum(h, weight, bias, x, w, mask_id=MASK)
    torch.testing.assert_close(terms, torch.nn.functional.cross_entropy(logits, x, reduction="none"))
    torch.testing.assert_close(total, (terms * w).sum(), rtol=1e-5, atol=1e-5)
    p = logits.softmax(1)
    torch.testing.assert_close(dense_expected_embedding(h, weight, bias, embedding, mask_id=MASK), p @ embedding)
    best = p.topk(3, dim=1)
    p = torch.zeros_like(p).scatter(1, best.indices, best.values / best.values.sum(1, keepdim=True))
    found = dense_expected_embedding(h, weight, bias, embedding, mask_id=MASK, top_k=3)
    torch.testing.assert_close(found, p @ embedding, rtol=1e-5, atol=1e-5)


def test_no_masked_position_at_all(problem):
    h, weight, bias, x, w, embedding = problem
    total, nll = weighted_nll_sum(h[:0], weight, bias, x[:0], w[:0], mask_id=MASK, chunk=4)
    total.backward()
    assert total == 0 and nll.shape == (0,) and weight.grad.abs().sum() == 0
    assert expected_embedding(h[:0], weight, bias, embedding, mask_id=MASK, chunk=4).shape == (0, D)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_head_equals_the_dense_one(problem, dtype, compiled, monkeypatch):
    """Of which everything but cuBLAS runs here, too; rows of the last chunk are fewer."""
    if compiled:
        for name in ("_nll", "_to_gradient", "_to_probabilities"):
            function = getattr(output_head_gpu, name).__wrapped__
            monkeypatch.setattr(output_head_gpu, name, torch.compile(function, fullgraph=True))
    h, weight, bias, x, w, embedding = (t.detach() for t in problem)
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    h = h.to(dtype)
    blocked = subs_bias(bias, MASK)
    nll, *ours = output_head_gpu.nll_and_gradients(
        h, weight, blocked, x, w, chunk=10, need_gradient=True, train_head=True
    )
    dense = [t.float().clone().requires_grad_() for t in (h, weight, bias)]
    expected = torch.nn.functional.cross_entropy(dense_logits(*dense), x, reduction="none")
    torch.testing.assert_close(nll, expected.detach(), **bound)
    for a, b in zip(ours, torch.autograd.grad((expected * w).sum(), dense), strict=True):
        torch.testing.assert_close(a.float(), b, **bound)
    assert ours[0].dtype == dtype and ours[1].shape == weight.shape and ours[2][MASK] == 0
    estimate = output_head_gpu.estimate(h, weight, blocked, embedding, chunk=10)
    probability = dense_logits(*(t.detach() for t in dense)).softmax(1)
    torch.testing.assert_close(estimate, probability @ embedding, **bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_head_takes_the_most_probable_tokens_in_the_dtype_of_its_states(dtype):
    """4,099 tokens, which it pads; no result has more than a chunk's padded logits, and none of those float32."""
    vocab, rows, top_k = 4099, 25, 16
    g = torch.Generator().manual_seed(0)
    h, weight, embedding = (torch.randn(n, 8, generator=g) for n in (rows, vocab, vocab))
    bias, h = torch.randn(vocab, generator=g), h.to(dtype)
    blocked = subs_bias(bias, vocab - 1)
    with LargestTensor() as largest:
        found = output_head_gpu.top_k_estimate(h, weight, blocked, embedding, top_k, chunk=10)
    assert largest.numel <= max(10 * 4160, weight.numel() + 8 * 64)
    logits = torch.addmm(blocked.to(dtype), h, weight.to(dtype).T).float()
    best = logits.topk(top_k, dim=1)
    expected = (best.values.softmax(1)[:, :, None] * embedding[best.indices]).sum(1)
    assert found.dtype == embedding.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:  # rounded alike, but for the order of sums; which of two equal logits is the sixteenth does not matter much
        assert (found - expected).norm() <= 0.05 * expected.norm()


def test_the_gpu_head_makes_no_gradient_that_nobody_needs(problem):
    h, weight, bias, x, w, _ = (t.detach() for t in problem)
    arguments = (h, weight, subs_bias(bias, MASK), x, w)
    _, *none = output_head_gpu.nll_and_gradients(*arguments, chunk=10, need_gradient=False, train_head=False)
    assert none == [None, None, None]
    _, d_h, *none = output_head_gpu.nll_and_gradients(*arguments, chunk=10, need_gradient=True, train_head=False)
    assert d_h.shape == h.shape and none == [None, None]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation, the autograd engine's included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize(("chunk", "small"), [(64, True), (4096, False)])
def test_no_b_l_v_tensor_in_a_training_step(chunk, small):
    """All positions masked (the worst case); with one huge chunk the tensor appears, so the probe can see it."""
    batch_size, length, vocab = 16, 32, 1000
    config = DiTConfig(width=16, layers=1, heads=2, self_conditioned=True, head_chunk=chunk)
    model = DiT(config, vocab_size=vocab, mask_id=vocab - 1, schedule=LogLinear())
    init_weights(model, 0)
    x = torch.randint(0, vocab - 1, (batch_size, length))
    batch = noise_batch(
        Sequences(x, torch.ones_like(x).bool(), torch.arange(batch_size)),
        torch.ones(batch_size).double(),
        schedule=LogLinear(),
        mask_id=vocab - 1,
        seed=0,
        step=0,
        rate=1.0,
    )
    with LargestTensor() as largest:
        self_conditioned_nelbo(model, batch, LogLinear(), condition=True).loss.backward()
    assert (largest.numel < batch_size * length * vocab / 4) == small


def test_a_weight_that_needs_no_change_is_not_copied():
    weight = torch.randn(128, D)
    assert output_head_gpu._widen(weight, torch.float32) is weight
    assert output_head_gpu._widen(weight[:127], torch.float32).shape == (128, D)
    assert output_head_gpu._widen(weight, torch.bfloat16).dtype == torch.bfloat16
