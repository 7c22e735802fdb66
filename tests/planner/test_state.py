"""Planned weights, gradients, moments and averages, against the tensors of real engines."""

import dataclasses

import pytest
import torch

from benchmarks.counting import fake_ranks
from scmdm.distributed.ema import Ema
from scmdm.planner.communication import step_collectives
from scmdm.planner.sharding import rank_state
from scmdm.planner.workload import make_layout, make_workload
from scmdm.training import setup
from tests.planner.measuring import (
    Collectives,
    engine_of,
    loss_of,
    masked_batch,
    run_config,
    spec_of,
    storage_bytes,
)

VOCAB, LENGTH = 61, 8


def planned(config, ranks, vocab=VOCAB, dtype=torch.float32):
    return rank_state(make_workload(config, spec_of(config, vocab, LENGTH)), make_layout(config, ranks, dtype))


def optimizer_bytes(engine):
    engine.moments()
    return storage_bytes([value for state in engine.optimizer.state.values() for value in state.values()])


@pytest.mark.parametrize("conditioner", ["projection", "norm", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (3, 1), (8, 1), (8, 4), (1024, 1), (1024, 16)])
def test_fsdp2_holds_what_is_planned_to_the_byte(ranks, replicate, dtype, conditioner):
    config = run_config("fsdp2", batch=ranks, fsdp={"replicate": replicate}, conditioner=conditioner, width=16)
    with fake_ranks(ranks):
        engine = engine_of(config, VOCAB, LENGTH, dtype)
        averages = Ema(engine, config.ema).average
        weights = storage_bytes(engine.parameters().values())
        moments = optimizer_bytes(engine)
        engine.backward(loss_of(engine, config, masked_batch(1, LENGTH, VOCAB)), last=True)
        gradients = sum(parameter.grad.to_local().nbytes for parameter in engine.trained.values())
    expected = planned(config, ranks, dtype=dtype)
    assert dataclasses.astuple(expected) == (weights, gradients, moments, storage_bytes(averages.values()), 0)


@pytest.mark.parametrize("engine", ["single", "fsdp2"])
@pytest.mark.parametrize("part", [{"lora_rank": 4}, {"last_layers": 1}, {"last_layers": 0}], ids=str)
def test_what_is_not_trained_has_only_weights(part, engine):
    """And the reductions that are planned are of what has gradients."""
    ranks = 8 if engine == "fsdp2" else 1
    config = run_config(engine, batch=ranks, width=16, **{k: v for k, v in part.items() if k == "lora_rank"})
    config.train.last_layers = part.get("last_layers")
    with fake_ranks(ranks), Collectives() as sent:
        built = engine_of(config, VOCAB, LENGTH)
        averages = Ema(built, config.ema).average
        weights = storage_bytes([*built.parameters().values(), *built.frozen().values()])
        moments = optimizer_bytes(built)
        built.backward(loss_of(built, config, masked_batch(1, LENGTH, VOCAB)), last=True)
        gradients = storage_bytes([p.grad for p in built.model.parameters() if p.grad is not None])
    expected = planned(config, ranks)
    assert dataclasses.astuple(expected) == (weights, gradients, moments, storage_bytes(averages.values()), 0)
    assert gradients < weights / 2
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    reduced = [c for c in step_collectives(workload, make_layout(config, ranks, torch.float32)) if "reduce" in c.kind]
    assert sum(one.size * one.times for one in reduced) == sent.bytes("reduce_scatter")


@pytest.mark.parametrize("ranks", [5, 1024])
def test_no_rank_holds_more_than_rank_0(ranks, monkeypatch):
    # Values do not matter, and DTensor remembers which rank this process was before.
    monkeypatch.setattr(setup, "init_weights", lambda *_, **__: None)
    config = run_config("fsdp2", batch=ranks, width=16)
    expected = planned(config, ranks).weights
    for rank in (1, ranks // 2, ranks - 1):
        with fake_ranks(ranks, rank):
            shards = engine_of(config, VOCAB, LENGTH).parameters().values()
            assert sum(shard.to_local().nbytes for shard in shards) <= expected
            assert storage_bytes(shards) == expected  # padded to rank 0's size


def test_eight_billion_parameters_on_1024_ranks(monkeypatch):
    """On the meta device: shards have shapes and no memory."""
    monkeypatch.setattr(setup, "allocate", lambda *_, **__: None)
    monkeypatch.setattr(setup, "init_weights", lambda *_, **__: None)
    config = run_config("fsdp2", batch=1024, width=4096, layers=36, heads=32, condition_width=128)
    with fake_ranks(1024):
        engine = engine_of(config, 50258, LENGTH, torch.bfloat16)
        weights, averages = engine.parameters().values(), Ema(engine, config.ema).average.values()
        engine.moments()
        moments = [value for state in engine.optimizer.state.values() for value in state.values()]
        found = [sum(getattr(x, "_local_tensor", x).nbytes for x in one) for one in (weights, moments, averages)]
    expected = planned(config, 1024, 50258, torch.bfloat16)
    assert [expected.weights, expected.moments, expected.averages] == found
    assert 7.7e9 / 1024 * 4 < expected.weights < 7.9e9 / 1024 * 4


@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_one_process_holds_everything_whole(decay):
    config = run_config("single")
    config.ema.decay = decay
    engine = engine_of(config, VOCAB, LENGTH)
    engine.backward(loss_of(engine, config, masked_batch(1, LENGTH, VOCAB)), last=True)
    weights = storage_bytes(engine.parameters().values())
    gradients = sum(parameter.grad.nbytes for parameter in engine.trained.values())
    expected = planned(config, 1)
    assert (expected.weights, expected.gradients, expected.moments) == (weights, gradients, optimizer_bytes(engine))
    assert expected.averages == (storage_bytes(Ema(engine, config.ema).average.values()) if decay else 0)
