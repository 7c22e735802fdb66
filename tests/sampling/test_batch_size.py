"""Batch sizes from free memory, against the memory that evaluations need."""

import dataclasses
from functools import partial

import pytest
import torch

from scmdm.config.diffusion import DiffusionConfig
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.state import State
from scmdm.distributed.engine import compute_context
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.dit import DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import ModelSpec, allocate
from scmdm.planner.activation_memory import LiveBytes
from scmdm.sampling.batch_size import (
    batch_size_for,
    copied_bytes,
    evaluation_bytes,
    evaluation_bytes_per_token,
    even_batch_size,
    fixed_bytes,
)

MODELS = {
    "dit": DiTConfig(width=128, layers=2, heads=4, self_conditioned=True),
    "decoder": DecoderConfig(width=128, layers=2, heads=4, kv_heads=2, self_conditioned=True),
    "plain": DiTConfig(width=128, layers=2, heads=4),
}


@pytest.mark.parametrize("count", [1, 5, 64, 1000])
@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("most", [1, 7, 64])
def test_batches_are_even(count, workers, most):
    size = even_batch_size(count, workers, most)
    assert 1 <= size <= most
    rounds = -(-count // (workers * most))
    assert -(-count // size) <= workers * rounds, "no worker has a batch more than it must"


def test_batch_size_follows_memory_length_and_vocabulary():
    model = MODELS["dit"]

    def size(free, model, **keys):
        return batch_size_for(free, partial(evaluation_bytes, model=model, **keys))

    keys = {"length": 128, "vocab_size": 1000, "bytes_per_number": 2}
    sizes = [size(free, model, **keys) for free in (0, 2**27, 2**28, 2**40)]
    assert sizes[0] == 1 and sizes[0] < sizes[1] < sizes[2] < sizes[3] == 1024
    free = 2**28
    assert size(free, model, **{**keys, "length": 256}) <= -(-sizes[2] // 2)
    assert size(free, model, **{**keys, "vocab_size": 5000}) < sizes[2]
    assert size(free, model, **keys, predictions=2) < sizes[2]
    assert size(free, model, **keys, padded=True) < sizes[2]
    assert size(free, dataclasses.replace(model, width=512), **keys) < sizes[2]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_bounds_what_a_sampler_allocates(name, dtype):
    """More sequences, of which the logits of a chunk are a small part: the peak is at most the formula's."""
    config, vocab, length, rows = MODELS[name], 40, 64, 24
    spec = ModelSpec(config, DiffusionConfig(), vocab, vocab - 1, length)
    model = spec.build()
    allocate(model, torch.device("cpu"))
    init_weights(model, 0)
    model.eval()
    given = torch.full((rows, length), vocab - 1)
    settings = SamplerSettings(kind="confidence", steps=2, carry=config.self_conditioned)

    def draw():
        with compute_context(torch.device("cpu"), dtype):
            sample(
                model, given, torch.arange(rows), schedule=spec.schedule, settings=settings, mask_id=vocab - 1, seed=0
            )

    per_token = evaluation_bytes_per_token(config, bytes_per_number=dtype.itemsize)
    expected = per_token * rows * length + fixed_bytes(config, vocab)
    with LiveBytes(model.parameters()) as live:
        draw()
    assert expected / 3 < live.peak < expected


def test_copies_that_autocast_keeps_are_counted():
    config, vocab, length = DiTConfig(width=256, layers=8, heads=4, self_conditioned=True), 40, 8
    spec = ModelSpec(config, DiffusionConfig(), vocab, vocab - 1, length)
    model = spec.build()
    allocate(model, torch.device("cpu"))
    init_weights(model, 0)
    model.eval()
    numel = sum(parameter.numel() for parameter in model.parameters())
    for dtype, kept in ((torch.float32, False), (torch.bfloat16, True)):
        copies = copied_bytes(numel, held=4, computed=dtype.itemsize)
        with LiveBytes(model.parameters()) as live, torch.no_grad(), compute_context(torch.device("cpu"), dtype):
            model.hidden(State(torch.full((1, length), vocab - 1), torch.ones(1).double()))
        own = evaluation_bytes(1, config, length=length, vocab_size=vocab, bytes_per_number=dtype.itemsize)
        assert (copies > 0) == kept and (live.peak > own) == kept
        assert copies / 2 < live.peak < copies + own
