"""All blocks as one graph: what a step computes, and that nothing breaks the graph."""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.utils import counters

from scmdm.config.run import RunConfig
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.system.process_group import World
from scmdm.training.setup import resolve_engine
from tests.models.test_precision_switches import DECODER, DIT, LENGTH, difference, engine_of, step_of

ONE, TWO = World(0, 1, 0), World(0, 2, 0)


@pytest.fixture
def traced(monkeypatch):
    """Graphs of forward and backward passes run as torch's own operators, which needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "keys", "dtype", "tolerance"),
    [
        (DIT, {}, torch.float32, 1e-5),
        (DIT, {"activation_checkpointing": "selective", "lora_rank": 4}, torch.float32, 1e-5),
        (DECODER, {"activation_checkpointing": "full"}, torch.float32, 1e-5),
        (DECODER, {"matmul_precision": "fp8"}, torch.float32, 1e-2),  # other roundings to FP8
        (DECODER, {"residual_precision": "compute"}, torch.bfloat16, 0.05),
    ],
    ids=["dit", "dit-lora-selective", "decoder-full", "decoder-fp8", "decoder-narrow"],
)
def test_a_step_is_that_of_the_model_as_written(model, keys, dtype, tolerance, traced):
    """Loss and gradients of a step with both passes, of which each is one graph for both micro-batches."""
    model = dataclasses.replace(model, layers=2, **keys)
    wanted = step_of(model, dtype)
    found = step_of(dataclasses.replace(model, compile="trunk"), dtype)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    loss, gradients = difference(found, wanted)
    assert loss < tolerance and gradients < tolerance


@pytest.mark.slow
def test_changing_lengths_are_one_more_graph(traced):
    engine, _ = engine_of(dataclasses.replace(DIT, layers=2, compile="trunk"), torch.float32)
    plain, _ = engine_of(dataclasses.replace(DIT, layers=2), torch.float32)
    for length in (LENGTH, 20, 24, 28):
        state = State(torch.arange(4 * length).view(4, -1) % 49, torch.rand(4).double())
        with torch.no_grad():
            torch.testing.assert_close(engine.model.hidden(state), plain.model.hidden(state), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_what_cannot_be_one_graph_is_refused():
    config = RunConfig(model=dataclasses.replace(DIT, compile="trunk"))
    assert resolve_engine(config, ONE).engine == "single"
    config.train.micro_batch_size = config.train.global_batch_size // 2
    with pytest.raises(UserError, match=r"model\.compile=trunk .* engine=fsdp2"):
        resolve_engine(config, TWO)
    config.model = dataclasses.replace(DIT, compile="block", activation_checkpointing="selective")
    with pytest.raises(UserError, match=r"model\.activation_checkpointing=selective"):
        config.model.validate()
