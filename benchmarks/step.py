"""Cost of an adaptation step over a vanilla step, of a vanilla step over the dense baseline, and of the output head.

In theory a forward pass costs 1 and a backward pass 2, so that a vanilla step costs 3 and an adaptation step 4: a ratio
of 4/3. The head of the estimate computes two products with the vocabulary instead of one, which adds to that.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.baselines.dense import DenseDenoiser
from benchmarks.baselines.published_step import make_published_step
from benchmarks.timing import Timing, interleave, ratios, show, show_figures
from scmdm.config.run import RunConfig
from scmdm.config.training import EmaConfig
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import Engine, resolve_device, resolve_precision
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.flops import peak_flops, step_flops
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import ModelSpec
from scmdm.ops.output_head import weighted_nll_sum
from scmdm.training.optimizer import set_lr
from scmdm.training.setup import build_engine
from scmdm.training.step import train_step


@dataclass(frozen=True)
class Shape:
    """A model and a batch of random tokens."""

    name: str
    model: DiTConfig
    vocab: int
    length: int
    batch: int  # sequences per step
    micro: int | None = None  # sequences per pass; None: all


QM9 = Shape("QM9 quickstart (V = 34, L = 32, B = 256)", DiTConfig(), 34, 32, 256)
TEXT = Shape("text (V = 50,258, L = 256, B = 4, D = 256)", DiTConfig(width=256, layers=4, heads=4), 50_258, 256, 4)
_SMALL = DiTConfig(width=768, layers=12, heads=12, condition_width=128)
SMALL = Shape("MDLM small (170M, V = 50,258, L = 256, B = 1)", _SMALL, 50_258, 256, 1)
_TOP_K = 16
_VANILLA, _ADAPTATION = "vanilla step (rate 0)", "adaptation step (rate 1)"
_PUBLISHED = "MDLM's published step"
_HALF = "adaptation step, inject_layer at half depth"
# As in configs/text/owt-base.yaml on 8 GPUs, but without dropout.
_COMPILED = DiTConfig(compile="block", condition_width=128)
SMALL_GPU = Shape(
    "MDLM small on a GPU (170M, V = 50,258, L = 1024, B = 64)",
    replace(_COMPILED, width=768, layers=12, heads=12),
    50_258,
    1024,
    64,
    32,
)
BILLION_GPU = Shape(
    "a billion parameters on a GPU (V = 50,258, L = 1024, B = 64)",
    replace(_COMPILED, width=2048, layers=16, heads=16),
    50_258,
    1024,
    64,
    32,
)


def main() -> None:
    """Print ratios for two shapes that a laptop runs in a minute."""
    _compare(QM9, rounds=15)
    _compare(TEXT, rounds=15)


def small() -> None:
    """Print ratios for MDLM's size; on a CPU this takes some minutes and 8 GiB of memory."""
    if torch.cuda.is_available():
        _compare_alone(SMALL_GPU)
    else:
        _compare(SMALL, rounds=3)


def billion() -> None:
    """Print ratios for a billion parameters, on a GPU."""
    if torch.cuda.is_available():
        _compare_alone(BILLION_GPU)
    else:
        print("\nbillion: no CUDA device")


def _compare(shape: Shape, rounds: int) -> None:
    dense, dense_step = make_engine_step(shape, rate=0.0)
    dense.denoiser = DenseDenoiser(dense.model)
    steps: dict[str, Callable[[], object]] = {
        _VANILLA: make_engine_step(shape, rate=0.0)[1],
        _ADAPTATION: make_engine_step(shape, rate=1.0)[1],
        _HALF: make_engine_step(shape, rate=1.0, inject_layer=shape.model.layers // 2)[1],
        f"adaptation step, top-{_TOP_K} estimate": make_engine_step(shape, rate=1.0, top_k=_TOP_K)[1],
        "dense vanilla step": dense_step,
    }
    show(f"step: {shape.name}", interleave(steps, rounds=rounds), _VANILLA)


def published() -> None:
    """Print a step with the work of MDLM's published code over ours, in float32, each with averaged weights."""
    shape, layers, rounds = TEXT, TEXT.model.layers, 7
    tokens = torch.randint(0, shape.vocab - 1, (shape.batch, shape.length))
    steps: dict[str, Callable[[], object]] = {
        _VANILLA: _averaged_step(shape, rate=0.0),
        _ADAPTATION: _averaged_step(shape, rate=1.0),
        _HALF: _averaged_step(shape, rate=1.0, inject_layer=layers // 2),
        _PUBLISHED: make_published_step(shape.model, shape.vocab, tokens),
    }
    timings = interleave(steps, rounds=rounds)
    show(f"published step: {shape.name}, float32", timings, _VANILLA)
    found = {
        name: [1 / ratio for ratio in ratios(timings, _PUBLISHED)[name]] for name in (_VANILLA, _ADAPTATION, _HALF)
    }
    texts = {name: f"{statistics.median(values):.2f}" for name, values in found.items()}
    show_figures(f"published step over ours: {shape.name}, float32", texts, found)


def _averaged_step(shape: Shape, *, rate: float, inject_layer: int = 0) -> Callable[[], object]:
    engine, step = make_engine_step(shape, rate=rate, inject_layer=inject_layer, precision="float32")
    ema = Ema(engine, EmaConfig())

    def averaged() -> None:
        step()
        ema.update(engine)

    return averaged


def _compare_alone(shape: Shape) -> None:
    """Time the steps one after the other, because a GPU has no other load and too little memory for all."""
    timings: dict[str, Timing] = {}
    lines = []
    for passes, name in enumerate((_VANILLA, _ADAPTATION)):
        torch.cuda.reset_peak_memory_stats()
        timings |= interleave({name: make_engine_step(shape, rate=float(passes))[1]}, warmup=2, rounds=5)
        lines.append(f"  {name:<44}{_utilisation(shape, passes, timings[name])}")
        gc.collect()
        torch.cuda.empty_cache()
    show(f"step: {shape.name}", timings, _VANILLA)
    print("\n".join(lines), flush=True)


def _utilisation(shape: Shape, passes: int, timing: Timing) -> str:
    """Describe tokens per second, model FLOPs utilisation (by median time) and peak memory."""
    config, seconds = replace(shape.model, self_conditioned=passes > 0), statistics.median(timing.wall)
    flops = step_flops(config, shape.vocab, shape.length, LogLinear(), passes=passes).total * shape.batch
    peak = peak_flops(torch.device("cuda"))
    share = f"{flops / seconds / peak:.3f}" if peak is not None else "unknown"
    gib = torch.cuda.max_memory_allocated() / 2**30
    return f"{shape.batch * shape.length / seconds:,.0f} tokens/s, MFU {share}, {gib:.1f} GiB"


def head() -> None:
    """Print times of the output head; on a GPU also those of liger-kernel, if installed."""
    loss, estimate = "loss with gradients", "expected embedding"
    for shape in (SMALL_GPU,) if torch.cuda.is_available() else (QM9, TEXT):
        shape = replace(shape, batch=shape.micro or shape.batch)
        parts = {loss: _head(shape, loss=True), estimate: _head(shape, loss=False)}
        if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
            parts["liger's loss with gradients"] = _liger(shape)
        show(f"head: {shape.name}", interleave(parts, rounds=5, warmup=2), loss)


def _liger(shape: Shape) -> Callable[[], object]:
    """Make a step of liger-kernel's fused linear cross-entropy, without position weights, on the same rows."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    dit, h_ND, x_N = _head_inputs(shape)
    (weight_VD, bias_V), loss = dit.head(), LigerFusedLinearCrossEntropyLoss(reduction="sum")
    assert bias_V is not None

    def step() -> None:
        h = h_ND.detach().requires_grad_()
        loss(weight_VD.to(h.dtype), h, x_N, bias_V.to(h.dtype)).backward()

    return step


def make_engine_step(
    shape: Shape,
    *,
    rate: float,
    engine: str = "single",
    top_k: int | None = None,
    ranks: int = 1,
    inject_layer: int = 0,
    precision: str = "auto",
) -> tuple[Engine, Callable[[], object]]:
    """Return an engine, and a function that runs one optimizer step on random tokens, `shape.batch` on each rank."""
    device = resolve_device("auto")
    config = RunConfig()
    config.train.global_batch_size = shape.batch * ranks
    config.train.micro_batch_size = shape.micro or shape.batch
    config.self_conditioning.rate = rate
    model_config = replace(
        shape.model, self_conditioned=rate > 0, estimate_top_k=top_k, inject_layer=inject_layer if rate > 0 else 0
    )
    config.engine, config.model = engine, model_config
    spec = ModelSpec(model_config, config.diffusion, shape.vocab, shape.vocab - 1, shape.length)
    built = build_engine(config, spec, None, device, resolve_precision(precision, device))
    built.model.train()
    set_lr(built.optimizer, 1.0)
    tokens = torch.randint(0, shape.vocab - 1, (shape.batch, shape.length), device=device)
    ids = torch.arange(shape.batch, device=device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    # A constant step number fixes times and masks, hence the work.
    batch = Sequences(tokens, valid, ids)
    step = functools.partial(train_step, built, config, LogLinear(), shape.vocab - 1, batch, 0)
    return built, step


def _head(shape: Shape, *, loss: bool) -> Callable[[], object]:
    dit, h_ND, x_N = _head_inputs(shape)
    return functools.partial(_loss, dit, h_ND, x_N) if loss else functools.partial(_estimate, dit, h_ND)


def _head_inputs(shape: Shape) -> tuple[DiT, Tensor, Tensor]:
    """Make a model and hidden states for half of all positions, the average number of masked ones."""
    device = resolve_device("auto")
    dit = DiT(shape.model, vocab_size=shape.vocab, mask_id=shape.vocab - 1, schedule=LogLinear()).to(device)
    init_weights(dit, 0)
    rows = shape.batch * shape.length // 2
    h_ND = torch.randn(rows, shape.model.width, device=device).to(resolve_precision("auto", device))
    return dit, h_ND, torch.randint(0, shape.vocab - 1, (rows,), device=device)


@torch.no_grad()
def _estimate(dit: DiT, h_ND: Tensor) -> Tensor:
    return dit.expected_embedding(h_ND)


def _loss(dit: DiT, h_ND: Tensor, x_N: Tensor) -> None:
    (weight_VD, bias_V), weights = dit.head(), torch.ones(len(h_ND), device=h_ND.device)
    assert bias_V is not None
    total, _ = weighted_nll_sum(
        h_ND.detach().requires_grad_(),
        weight_VD,
        bias_V,
        x_N,
        weights,
        mask_id=dit.mask_id,
        chunk=dit.config.head_chunk,
    )
    total.backward()
