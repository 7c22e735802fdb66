"""The collectives of a training step, counted in two real processes: those of the engine plus one small one."""

import json

import pytest

from tests.conftest import ADAPTED, TINY
from tests.distributed.launching import launch
from tests.distributed.test_expert_ranks import EXPERTS

pytestmark = pytest.mark.slow

BATCH, RANKS, LAYERS = 64, 2, 2
SMALL = 8 * (2 * BATCH + 3 * RANKS)  # bytes: an id and a count per sample, a loss, a signal and a length per rank
ROOT_AND_BLOCKS = 1 + LAYERS  # groups of FSDP2


def counted(processes, molecules, empty_yaml, tmp_path, *keys, model=TINY):
    """Numbers and bytes by operator of the last steps, of each rank."""
    often = ["train.steps=5", "train.log_every=1000", "train.checkpoint_every=1000", "self_conditioning.rate=0.5"]
    arguments = ["train", empty_yaml, f"run_dir={tmp_path / 'run'}", f"data.path={molecules}", *model, *often, *keys]
    status, output = launch(processes, tmp_path / "out", *arguments, module="tests.distributed.collectives")
    assert status == 0, output
    assert "Warning" not in output
    found = [json.loads((tmp_path / f"out.{rank}").read_text())[-2:] for rank in range(max(1, processes))]
    assert all(steps == found[0] for steps in found) and found[0][0] == found[0][1]
    return found[0][0]


def test_one_process_has_none(molecules, empty_yaml, tmp_path):
    assert counted(0, molecules, empty_yaml, tmp_path, "engine=single") == {}


def test_fsdp2_has_its_own_and_one_small_one(molecules, empty_yaml, tmp_path):
    """Gathers of the forward and the backward pass (the root stays gathered), scatters, and the gradient's norm."""
    found = counted(RANKS, molecules, empty_yaml, tmp_path)
    numbers = {name: number for name, (number, _) in found.items()}
    assert numbers == {
        "_allgather_base_": ROOT_AND_BLOCKS + LAYERS + 1,
        "_reduce_scatter_base_": ROOT_AND_BLOCKS,
        "all_reduce": 1,
    }
    assert found["all_reduce"][1] < SMALL, "a number per parameter"


@pytest.mark.parametrize("padding", ["length", "batch"])
def test_the_small_collective_has_a_few_numbers_per_sample(padding, molecules, empty_yaml, tmp_path):
    """With a shard group of one rank FSDP2 gathers nothing: what is left is the one collective."""
    found = counted(RANKS, molecules, empty_yaml, tmp_path, "fsdp.replicate=2", f"train.padding={padding}")
    assert found.pop("_allgather_base_") == [1, SMALL]
    assert found.keys() == {"allreduce_"}
    assert found["allreduce_"][0] == ROOT_AND_BLOCKS


def test_counts_of_experts_are_summed_and_not_gathered(molecules, empty_yaml, tmp_path):
    model = [*ADAPTED, *EXPERTS]
    found = counted(RANKS, molecules, empty_yaml, tmp_path, "fsdp.replicate=2", model=model)
    assert found["_allgather_base_"] == [1, SMALL]
