"""Plans of mixtures of experts: parameters that a token meets, memory measured on fake tensors, and what ranks send."""

import collections
import dataclasses

import pytest
import torch

from benchmarks.counting import fake_ranks
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.run import RunConfig
from scmdm.distributed import fsdp
from scmdm.distributed.ema import Ema
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.experts.expert_parallel import ExpertGroup
from scmdm.models.model_files import ModelSpec
from scmdm.planner import search as planner_search
from scmdm.planner.activation_memory import measure_activations
from scmdm.planner.communication import step_collectives
from scmdm.planner.hardware import GPUS, Assumptions, Cluster
from scmdm.planner.search import evaluate, impossible_because, search
from scmdm.planner.sharding import gathered_weights, rank_state
from scmdm.planner.workload import make_layout, make_workload
from tests.planner.measuring import (
    Collectives,
    engine_of,
    loss_of,
    masked_batch,
    run_config,
    spec_of,
    storage_bytes,
)

MODEL = DecoderConfig(
    width=64, layers=4, heads=4, mlp_width=96, experts=16, experts_per_token=2, expert_width=32, dense_layers=2
)


def workload_of(model):
    config = RunConfig(model=model, engine="fsdp2")
    return make_workload(config, ModelSpec(model, DiffusionConfig(), 50, 49, 32)), make_layout(
        config, 4, torch.bfloat16
    )


def test_a_token_meets_its_experts_alone():
    workload, _ = workload_of(MODEL)
    routed = 2 * 16 * 3 * 64 * 32
    assert workload.active_numel == workload.numel - routed + routed * 2 // 16
    dense, _ = workload_of(DecoderConfig(width=64, layers=4, heads=4, mlp_width=96))
    assert dense.active_numel == dense.numel
    attention, mlp = 64 * 4 * 64, 3 * 64 * 96
    assert MODEL.block_matrix_elements() == attention + (2 * mlp + 2 * (2 * 3 * 64 * 32 + 16 * 64)) // 4


def test_the_largest_block_is_gathered_and_all_weights_are_held_once():
    workload, layout = workload_of(MODEL)
    gathered, units = gathered_weights(workload, layout), workload.units()
    sizes = [sum(parameter.numel for parameter in unit) for unit in units]
    assert sizes[1] < sizes[-1] and gathered.block == pytest.approx(2 * sizes[-1], rel=0.01)
    assert gathered.blocks == pytest.approx(2 * sum(sizes[1:]), rel=0.01)
    assert rank_state(workload, layout).weights == pytest.approx(workload.numel, rel=0.01)  # 4 bytes, 4 ranks


def test_activations_grow_with_the_experts_of_a_token_not_with_all():
    def kept(**changes):
        options = {"gathered": True, "passes": 1, "trained_layers": None, "gpu": True}
        model = dataclasses.replace(MODEL, self_conditioned=True, dense_layers=0, **changes)
        return measure_activations(model, rows=2, length=256, dtype=torch.bfloat16, **options).kept_by_block

    few, many, more_each = kept(), kept(experts=32), kept(experts_per_token=4)
    tokens, rows = 2 * 256, 2 * 256 * 2
    assert many - few <= 16 * tokens * 4 * 3 + 16 * 8 * 2 * 2 * (64 + 3 * 32) * 2  # scores, and rows that align groups
    assert more_each - few >= rows * (2 * 64 + 3 * 32) * 2


class Echo(ExpertGroup):
    """A group of pretended ranks, each of which sends what this one does."""

    def all_to_all(self, received, sent, received_sizes, sent_sizes):
        super().all_to_all(received, sent, received_sizes, sent_sizes)
        received.copy_(sent)


SMALL = {"kind": "decoder", "width": 16, "layers": 3, "heads": 2, "mlp_width": 24, "dense_layers": 1}
SMALL |= {"experts": 8, "experts_per_token": 2, "expert_width": 12, "shared_experts": 1, "router_bias": True}


@pytest.mark.parametrize(
    ("experts", "fsdp_keys", "model", "batches"),
    [
        (1, {}, {}, 1),
        (2, {}, {}, 1),
        (4, {"reshard_after_estimate": True}, {"activation_checkpointing": "full"}, 2),
        (2, {}, {"activation_checkpointing": "selective", "inject_layer": 2}, 1),
        (2, {"replicate": 2}, {"lora_rank": 2}, 1),
        (8, {}, {}, 1),
    ],
)
def test_ranks_hold_and_send_what_is_planned_to_the_byte(experts, fsdp_keys, model, batches, monkeypatch):
    monkeypatch.setattr(fsdp, "ExpertGroup", Echo)
    ranks, vocab, length, dtype = 8, 19, 8, torch.bfloat16
    config = run_config("fsdp2", batch=ranks * batches, fsdp={"experts": experts, **fsdp_keys}, **SMALL, **model)
    workload, layout = make_workload(config, spec_of(config, vocab, length)), make_layout(config, ranks, dtype)
    with fake_ranks(ranks):
        engine = engine_of(config, vocab, length, dtype)
        averages = storage_bytes(Ema(engine, config.ema).average.values())
        held = storage_bytes([*engine.parameters().values(), *engine.frozen().values()])
        engine.moments()
        moments = storage_bytes([value for state in engine.optimizer.state.values() for value in state.values()])
        with Collectives() as sent:
            for index in range(batches):
                loss = loss_of(engine, config, masked_batch(1, length, vocab))
                engine.backward(loss, last=index == batches - 1)
    state, planned = rank_state(workload, layout), collections.Counter()
    assert (state.weights, state.moments, state.averages) == (held, moments, averages)
    for one in step_collectives(workload, layout):
        planned[one.kind, one.size] += one.times
    assert planned == sent.seen


def test_activations_are_those_of_a_share_of_the_experts():
    """With balanced loads a rank computes as many rows as without expert parallelism, and casts fewer weights."""
    options = {"rows": 2, "length": 256, "dtype": torch.bfloat16, "gathered": True, "passes": 1}
    options |= {"trained_layers": None, "gpu": True}
    model = dataclasses.replace(MODEL, self_conditioned=True, dense_layers=0)
    alone, shared = (measure_activations(model, **options, experts=ranks) for ranks in (1, 4))
    assert 0.8 * alone.kept < shared.kept < 1.2 * alone.kept
    rows = 2 * 256 * 2
    assert shared.backward - shared.kept < alone.backward - alone.kept + 4 * rows * 64 * 2


def test_the_search_shares_experts_where_sending_tokens_costs_less_than_gathering_weights():
    model = dataclasses.replace(MODEL, width=256, expert_width=1024, experts=64, dense_layers=0)
    config, cluster = RunConfig(model=model, engine="fsdp2"), Cluster(GPUS["h100"], 1, 8)
    shared = {}
    for length in (32, 8192):
        workload = make_workload(config, ModelSpec(model, DiffusionConfig(), 50, 49, length))
        start = make_layout(config, 8, torch.bfloat16)
        best = search(workload, start, cluster, Assumptions()).best
        assert best.fits and impossible_because(workload, best.layout) is None
        for experts in (1, 2, 4, 8):
            other = evaluate(workload, dataclasses.replace(best.layout, experts=experts), cluster, Assumptions())
            assert best.time.seconds <= 1.01 * other.time.seconds or not other.fits
        shared[length] = best.layout.experts
    assert shared[32] > 1 and shared[8192] == 1
    dense, start = workload_of(DecoderConfig(width=64, layers=4, heads=4, mlp_width=96))
    assert {one.experts for one in planner_search._layouts(dense, start, cluster)} == {1}
