"""What an adaptation step costs over a vanilla step, what a vanilla step costs over the dense baseline, and the head.

Theory without tricks: a forward pass costs 1, a backward pass 2; a vanilla step is 3, an adaptation step 4: 4/3. The
estimate's head makes two products where the loss's forward pass makes one, so a large vocabulary costs more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.dense import DenseDenoiser
from benchmarks.timing import interleave, show
from scmdm.config.schema import ModelConfig, RunConfig
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences
from scmdm.model.dit import DiT
from scmdm.model.head import weighted_nll_sum
from scmdm.model.init import init_weights
from scmdm.model.weights import ModelSpec
from scmdm.parallel.engine import Engine, resolve_device, resolve_precision
from scmdm.training.optimizer import set_lr
from scmdm.training.setup import build_engine
from scmdm.training.step import train_step


@dataclass(frozen=True)
class Shape:
    """A model on batches of random tokens."""

    name: str
    model: ModelConfig
    vocab: int
    length: int
    batch: int


QM9 = Shape("QM9 quickstart (V = 34, L = 32, B = 256)", ModelConfig(), 34, 32, 256)
TEXT = Shape("text (V = 50,258, L = 256, B = 4, D = 256)", ModelConfig(width=256, layers=4, heads=4), 50_258, 256, 4)
_SMALL = ModelConfig(width=768, layers=12, heads=12, condition_width=128)
SMALL = Shape("MDLM small (170M, V = 50,258, L = 256, B = 1)", _SMALL, 50_258, 256, 1)


def main() -> None:
    """Print the ratios of two shapes that a laptop can do in a minute."""
    _compare(QM9, rounds=7)
    _compare(TEXT, rounds=3)


def small() -> None:
    """Print those of MDLM's size: some minutes and 8 GiB of memory."""
    _compare(SMALL, rounds=3)


def _compare(shape: Shape, rounds: int) -> None:
    dense, dense_step = make_engine_step(shape, rate=0.0)
    dense.denoiser = DenseDenoiser(dense.model)
    steps: dict[str, Callable[[], object]] = {
        "vanilla step (rate 0)": make_engine_step(shape, rate=0.0)[1],
        "adaptation step (rate 1)": make_engine_step(shape, rate=1.0)[1],
        "dense vanilla step": dense_step,
    }
    show(f"step: {shape.name}", interleave(steps, rounds=rounds), "vanilla step (rate 0)")


def head() -> None:
    """Print the output head's share of a step."""
    loss, estimate = "loss with gradients", "expected embedding"
    for shape in (QM9, TEXT):
        parts = {loss: _head(shape, loss=True), estimate: _head(shape, loss=False)}
        show(f"head: {shape.name}", interleave(parts, rounds=5), loss)


def make_engine_step(shape: Shape, *, rate: float, engine: str = "single") -> tuple[Engine, Callable[[], object]]:
    """An engine, and one optimizer step of it on random tokens as a function without arguments."""
    device = resolve_device("auto")
    config = RunConfig()
    config.train.micro_batch_size = config.train.global_batch_size = shape.batch
    config.self_conditioning.rate = rate
    model_config = ModelConfig(**{**vars(shape.model), "self_conditioned": rate > 0})
    config.engine, config.model = engine, model_config
    spec = ModelSpec(model_config, config.diffusion, shape.vocab, shape.vocab - 1, shape.length)
    built = build_engine(config, spec, None, device, resolve_precision("auto", device))
    built.model.train()
    set_lr(built.optimizer, 1.0)
    tokens = torch.randint(0, shape.vocab - 1, (shape.batch, shape.length), device=device)
    ids = torch.arange(shape.batch, device=device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    # The same step number every time: the same times and masks, hence the same work.
    batch = Sequences(tokens, valid, ids)
    step = functools.partial(train_step, built, config, LogLinear(), shape.vocab - 1, batch, 0)
    return built, step


def _head(shape: Shape, *, loss: bool) -> Callable[[], object]:
    """The head on half of all positions, as many as are masked on average."""
    device = resolve_device("auto")
    dit = DiT(shape.model, vocab_size=shape.vocab, mask_id=shape.vocab - 1, schedule=LogLinear()).to(device)
    init_weights(dit, 0)
    rows = shape.batch * shape.length // 2
    h_ND = torch.randn(rows, shape.model.width, device=device).to(resolve_precision("auto", device))
    x_N = torch.randint(0, shape.vocab - 1, (rows,), device=device)
    return functools.partial(_loss, dit, h_ND, x_N) if loss else functools.partial(dit.expected_embedding, h_ND)


def _loss(dit: DiT, h_ND: Tensor, x_N: Tensor) -> None:
    (weight_VD, bias_V), weights = dit.head(), torch.ones(len(h_ND), device=h_ND.device)
    assert bias_V is not None
    h_ND = h_ND.detach().requires_grad_()
    total, _ = weighted_nll_sum(h_ND, weight_VD, bias_V, x_N, weights, mask_id=dit.mask_id, chunk=dit.config.head_chunk)
    total.backward()
