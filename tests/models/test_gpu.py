"""GPU kernels against the CPU."""

import pytest
import torch

from scmdm.config.run import RunConfig
from scmdm.diffusion.noise import keyed_uniform
from scmdm.diffusion.packing import make_packing
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.diffusion.token_draw import draw_tokens
from scmdm.distributed.engine import compute_context
from scmdm.models.attention import attend, flash_unusable_because
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import ModelSpec
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from scmdm.ops.fp8 import fp8_unusable_because, multiply, multiply_emulated, quantize_rows
from scmdm.ops.output_head import expected_embedding, weighted_nll_sum
from scmdm.training.optimizer import set_lr
from scmdm.training.setup import build_engine
from scmdm.training.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
VOCAB, MASK, LENGTH = 1003, 1002, 64  # no multiple of 64: the head pads


def on_gpu(*tensors):
    return [tensor.detach().cuda().requires_grad_(tensor.requires_grad) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head(dtype):
    g = torch.Generator().manual_seed(0)
    h, weight, bias = (torch.randn(*s, generator=g).div(4).requires_grad_() for s in ((700, 64), (VOCAB, 64), (VOCAB,)))
    x, w = torch.randint(0, MASK, (700,), generator=g), torch.rand(700, generator=g)
    embedding = torch.randn(VOCAB, 64, generator=g)
    found = []
    for tensors in ((h, weight, bias, x, w, embedding), on_gpu(h, weight, bias, x, w, embedding)):
        h_, weight_, bias_, x_, w_, embedding_ = tensors
        states = h_.to(dtype if h_.is_cuda else torch.float32)
        total, nll = weighted_nll_sum(states, weight_, bias_, x_, w_, mask_id=MASK, chunk=300)
        gradients = torch.autograd.grad(total, (h_, weight_, bias_))
        with torch.no_grad():
            estimate = expected_embedding(states, weight_, bias_, embedding_, mask_id=MASK, chunk=300)
            best = expected_embedding(states, weight_, bias_, embedding_, mask_id=MASK, chunk=300, top_k=16)
        # Which of two nearly equal logits is the sixteenth depends on rounding.
        found.append([total, nll, *gradients, estimate, *([best] if dtype == torch.float32 else [])])
    for cpu, gpu in zip(*found, strict=True):
        assert (cpu - gpu.cpu()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * cpu.norm()


@pytest.mark.parametrize("n", [1, 2, 33, 1000])
def test_draws_are_those_of_the_cpu(n):
    ids = torch.tensor([0, 1, 7, 2**31, 2**32 + 5, 2**40])
    for rows in (6, 3, 1):
        for step in (0, 1, 12345):
            cpu, gpu = (keyed_uniform(3, "token", step, ids[:rows].to(d), n) for d in ("cpu", "cuda"))
            assert torch.equal(cpu, gpu.cpu())
    logits = torch.randn(6, n, generator=torch.Generator().manual_seed(0))
    uniform = keyed_uniform(3, "token", 0, ids, n)
    assert torch.equal(draw_tokens(logits, uniform), draw_tokens(logits.cuda(), uniform.cuda()).cpu())


@pytest.mark.parametrize("backend", ["cudnn", "matmul"])
def test_attention_kernels_agree(backend):
    q, k, v = (torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = attend(q.float(), k.float(), v.float(), "sdpa")
    assert (attend(q, k, v, backend) - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "flash"])
@pytest.mark.parametrize("heads", [(8, 2), (28, 4), (4, 1)], ids=str)
def test_grouped_heads_are_those_of_the_expanded_form(heads, backend, masked):
    """Forward and gradients by each kernel in bfloat16, and in memory no copy of the keys for every query head."""
    if backend == "flash" and (reason := flash_unusable_because("cuda", torch.bfloat16)) is not None:
        pytest.skip(reason)
    numbers = (heads[0], heads[1], heads[1])
    q, k, v = (torch.randn(2, 256, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in numbers)
    allowed = torch.rand(2, 1, 256, 256, device="cuda").lt(0.7) | torch.eye(256, device="cuda").bool()
    mask = allowed if masked else None
    weight = torch.linspace(-1, 1, q.numel(), device="cuda").view_as(q)
    out = attend(q, k, v, backend, mask)
    found = [out, *torch.autograd.grad((out.float() * weight).sum(), (q, k, v))]
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    whole = attend(exact[0], *(x.repeat_interleave(heads[0] // heads[1], 2) for x in exact[1:]), "matmul", mask)
    wanted = [whole, *torch.autograd.grad((whole * weight).sum(), exact)]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and (one.float() - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("heads", [(8, 2), (28, 4)], ids=str)
def test_grouped_heads_of_packed_samples_are_those_of_a_mask(heads):
    packing = make_packing(torch.arange(512, device="cuda").div(100, rounding_mode="floor").expand(2, -1))
    numbers = (heads[0], heads[1], heads[1])
    q, k, v = (torch.randn(2, 512, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in numbers)
    found = []
    for masks in ((packing.allowed_B1LL, None), (None, packing.bounds_C)):
        out = attend(q, k, v, "varlen", *masks)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for by_mask, by_bounds in zip(*found, strict=True):
        assert (by_bounds - by_mask).norm() <= 0.01 * by_mask.norm()


needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and fp8_unusable_because(torch.device("cuda"), torch.bfloat16) is not None,
    reason="this GPU has no products in FP8",
)


@needs_fp8
@pytest.mark.parametrize("first", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [(48, 64, 32), (1, 128, 256), (300, 256, 144)], ids=str)
def test_the_fp8_kernel_is_its_emulation(shape, first):
    rows, common, columns = shape
    a = torch.randn(rows, common, device="cuda") * torch.logspace(-9, 3, rows, device="cuda")[:, None]
    operands = quantize_rows(a, first), quantize_rows(torch.randn(columns, common, device="cuda"), torch.float8_e4m3fn)
    found, wanted = multiply(*operands, torch.bfloat16).float(), multiply_emulated(*operands, torch.float32)
    assert ((found - wanted).norm(dim=1) <= 0.01 * wanted.norm(dim=1)).all()


@needs_fp8
@pytest.mark.parametrize("compile", ["none", "block", "trunk"])
def test_a_step_in_fp8_is_near_that_in_bfloat16(compile):
    """Two adaptation steps: losses within 2 %, norms of gradients 15 %."""
    found = [
        steps_of(torch.device("cuda"), torch.bfloat16, matmul_precision=kind, compile=compile)
        for kind in ("compute", "fp8")
    ]
    losses, norms = ([[getattr(step, name) for step in steps] for steps in found] for name in ("loss", "grad_norm"))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert norms[1] == pytest.approx(norms[0], rel=0.15)


def test_the_kernel_of_packed_samples_agrees_with_a_mask():
    documents = torch.arange(512, device="cuda").div(100, rounding_mode="floor").expand(2, -1)
    packing = make_packing(documents)
    q, k, v = (torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    found = []
    for masks in ((packing.allowed_B1LL, None), (None, packing.bounds_C)):
        out = attend(q, k, v, "varlen", *masks)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for by_mask, by_bounds in zip(*found, strict=True):
        assert (by_bounds - by_mask).norm() <= 0.01 * by_mask.norm()


def test_passes_without_gradients_are_those_with_them():
    """The perceptron's fused GELU."""
    config = DiTConfig(width=64, layers=3, heads=2)
    model = DiT(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.cuda().train()
    z = torch.randint(0, VOCAB, (4, LENGTH), device="cuda")
    state = State(z, torch.full((4,), 0.5, device="cuda", dtype=torch.float64))
    with torch.autocast("cuda", torch.bfloat16):
        expected = model.hidden(state).detach().float()
        with torch.no_grad():
            fused = model.hidden(state).float()
    assert (fused - expected).norm() <= 0.02 * expected.norm()


def steps_of(device, dtype, **keys):
    """Two adaptation steps of a model in which nothing starts at zero."""
    config = RunConfig()
    config.train.global_batch_size, config.train.micro_batch_size = 32, 16
    config.self_conditioning.rate, config.engine = 1.0, "single"
    config.model = DiTConfig(width=64, layers=2, heads=2, self_conditioned=True, **keys)
    spec = ModelSpec(config.model, config.diffusion, VOCAB, MASK, LENGTH)
    engine = build_engine(config, spec, None, device, dtype)
    for name, parameter in engine.trained.items():
        if any(part in name for part in ("adaLN", "output_layer", "conditioner")):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(0.2 * drawn)
    engine.model.train()
    set_lr(engine.optimizer, 1.0)
    tokens = torch.arange(32 * LENGTH).view(32, LENGTH).remainder(MASK).to(device)
    batch = Sequences(tokens, torch.ones_like(tokens).bool(), torch.arange(32, device=device))
    return [train_step(engine, config, LogLinear(), MASK, batch, step) for step in range(2)]


@pytest.mark.parametrize("residual", ["float32", "compute"])
@pytest.mark.parametrize("compile", ["none", "block", "trunk"])
def test_training_steps_are_those_of_the_cpu(compile, residual):
    """In bfloat16: losses within 2 %, norms of gradients 5 %."""
    theirs = steps_of(torch.device("cpu"), torch.float32)
    ours = steps_of(torch.device("cuda"), torch.bfloat16, compile=compile, residual_precision=residual)
    assert [step.loss for step in ours] == pytest.approx([step.loss for step in theirs], rel=0.02)
    assert [step.grad_norm for step in ours] == pytest.approx([step.grad_norm for step in theirs], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("carry", [True, False])
def test_samples_of_replayed_graphs_are_the_same(dtype, carry):
    model = DiT(
        DiTConfig(width=64, layers=3, heads=2, self_conditioned=True),
        vocab_size=VOCAB,
        mask_id=MASK,
        schedule=LogLinear(),
    )
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    model.cuda().eval()
    settings = SamplerSettings(steps=12, carry=carry)
    replayed = ReplayedDenoiser(model)

    def draw(denoiser, seed):
        start, ids = torch.full((8, LENGTH), MASK, device="cuda"), torch.arange(8, device="cuda")
        with compute_context(torch.device("cuda"), dtype):  # its copies of weights end here, the graphs do not
            return sample(denoiser, start, ids, schedule=LogLinear(), settings=settings, mask_id=MASK, seed=seed).tokens

    for seed in range(3):
        assert torch.equal(draw(replayed, seed), draw(model, seed))
    assert replayed.recorded
