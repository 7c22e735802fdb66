"""What an adaptation step costs over a vanilla step, and the output head's share of it.

Theory without tricks: a forward pass costs 1, a backward pass 2; a vanilla step is 3, an adaptation step 4: 4/3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import interleave, show
from scmdm.config.schema import ModelConfig, RunConfig
from scmdm.diffusion.schedule import LogLinear
from scmdm.model.dit import DiT
from scmdm.model.init import init_weights
from scmdm.model.weights import ModelSpec
from scmdm.parallel.engine import resolve_device, resolve_precision
from scmdm.training.optimizer import set_lr
from scmdm.training.setup import build_engine
from scmdm.training.step import train_step

# name, model, vocabulary, length, batch
SHAPES = (
    ("QM9 quickstart (V = 34, L = 32)", ModelConfig(), 34, 32, 256),
    ("text (V = 50,258, L = 256)", ModelConfig(width=256, layers=4, heads=4), 50_258, 256, 4),
)


def main() -> None:
    """Print the ratios for each shape."""
    for name, model, vocab, length, batch in SHAPES:
        steps = {
            "vanilla step (rate 0)": make_step(model, vocab, length, batch, rate=0.0),
            "adaptation step (rate 1)": make_step(model, vocab, length, batch, rate=1.0),
            "head alone: loss with gradients": _head(model, vocab, length, batch, loss=True),
            "head alone: expected embedding": _head(model, vocab, length, batch, loss=False),
        }
        show(name, interleave(steps), "vanilla step (rate 0)")


def make_step(
    model: ModelConfig, vocab: int, length: int, batch: int, *, rate: float, engine: str = "single"
) -> Callable[[], object]:
    """One optimizer step on random tokens, as a function without arguments."""
    device = resolve_device("auto")
    config = RunConfig()
    config.train.micro_batch_size = config.train.global_batch_size = batch
    config.self_conditioning.rate = rate
    model_config = ModelConfig(**{**vars(model), "self_conditioned": rate > 0})
    config.engine, config.model = engine, model_config
    spec = ModelSpec(model_config, config.diffusion, vocab, vocab - 1, length)
    built = build_engine(config, spec, None, device, resolve_precision("auto", device))
    built.model.train()
    set_lr(built.optimizer, 1.0)
    tokens = torch.randint(0, vocab - 1, (batch, length), device=device)
    ids = torch.arange(batch, device=device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    # The same step number every time: the same times and masks, hence the same work.
    return functools.partial(train_step, built, config, LogLinear(), vocab - 1, tokens, valid, ids, 0)


def _head(model: ModelConfig, vocab: int, length: int, batch: int, *, loss: bool) -> Callable[[], object]:
    """The head on half of all positions, as many as are masked on average."""
    device = resolve_device("auto")
    dit = DiT(model, vocab_size=vocab, mask_id=vocab - 1, schedule=LogLinear()).to(device)
    init_weights(dit, 0)
    rows = batch * length // 2
    h_ND = torch.randn(rows, model.width, device=device).to(resolve_precision("auto", device))
    x_N = torch.randint(0, vocab - 1, (rows,), device=device)
    return functools.partial(_loss, dit, h_ND, x_N) if loss else functools.partial(_estimate, dit, h_ND)


def _loss(dit: DiT, h_ND: Tensor, x_N: Tensor) -> None:
    from scmdm.model.head import weighted_nll_sum

    (weight_VD, bias_V), weights = dit.head(), torch.ones(len(h_ND), device=h_ND.device)
    assert bias_V is not None
    h_ND = h_ND.detach().requires_grad_()
    total, _ = weighted_nll_sum(h_ND, weight_VD, bias_V, x_N, weights, mask_id=dit.mask_id, chunk=dit.config.head_chunk)
    total.backward()


@torch.no_grad()
def _estimate(dit: DiT, h_ND: Tensor) -> None:
    dit.expected_embedding(h_ND)
