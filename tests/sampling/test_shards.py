"""Weights that ranks share, on simulated ranks."""

import pytest
import torch

from benchmarks.counting import fake_ranks
from scmdm.config.diffusion import DiffusionConfig
from scmdm.distributed.sharded_evaluation import shard_for_evaluation
from scmdm.errors import UserError
from scmdm.models.dit import DiTConfig
from scmdm.models.model_files import ModelSpec, allocate, set_dtype
from tests.planner.measuring import storage_bytes

CPU = torch.device("cpu")
SPEC = ModelSpec(DiTConfig(width=64, layers=3, heads=4, self_conditioned=True), DiffusionConfig(), 40, 39, 16)


@pytest.mark.parametrize(("ranks", "shards"), [(8, 8), (64, 8), (1024, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_allocates_its_part_of_the_weights(ranks, shards, dtype):
    model = SPEC.build()
    set_dtype(model, dtype)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    with fake_ranks(ranks, rank=ranks - 1):
        shard_for_evaluation(model, shards, CPU)
        allocate(model, CPU)
        own = storage_bytes(model.parameters())
    assert own <= 1.1 * whole / shards
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_groups_must_be_equal():
    with fake_ranks(6), pytest.raises(UserError, match="shards=4"):
        shard_for_evaluation(SPEC.build(), 4, CPU)
