"""Plans of mixtures of experts: parameters that a token meets, and memory measured on fake tensors."""

import dataclasses

import pytest
import torch

from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.run import RunConfig
from scmdm.models.decoder import DecoderConfig
from scmdm.models.model_files import ModelSpec
from scmdm.planner.activation_memory import measure_activations
from scmdm.planner.sharding import gathered_weights, rank_state
from scmdm.planner.workload import make_layout, make_workload

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
