"""With ZeRO, a rank opens and saves its share of a model: memory and bytes fall with the number of ranks."""

import json

import pytest

from tests.distributed.launching import launch

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def costs():
    """Rows of all ranks by number of ranks and stage."""
    found = {}
    for ranks in (1, 2, 4):
        status, output = launch(ranks, module="tests.distributed.zero_costs")
        assert status == 0, output
        line = next(line for line in output.splitlines() if line.startswith("RESULT"))
        for rank in json.loads(line.removeprefix("RESULT")):
            for row in rank:
                found.setdefault((ranks, row["stage"]), []).append(row)
    return found


def test_stage_3_never_allocates_a_whole_model(costs):
    """The rows, DeepSpeed's partitions, its copy for the optimizer and two moments: five shares."""
    for ranks in (1, 2, 4):
        for row in costs[ranks, 3]:
            assert row["opening"] * ranks == pytest.approx(5 * row["parameters"], rel=0.05), row


def test_a_save_of_stage_3_sends_the_ends_of_rows_alone(costs):
    """Count four copies of the parameters: weights, averages and two moments."""
    for ranks in (1, 2, 4):
        for row in costs[ranks, 3]:
            assert max(row["saved"], row["loaded"]) < 0.01 * row["parameters"], row
            assert row["packing"] * ranks < 4.5 * row["parameters"], row


def test_a_save_of_stage_1_sends_at_most_what_a_rank_holds(costs):
    for ranks in (1, 2, 4):
        for row in costs[ranks, 1]:
            share = 4 * row["parameters"] / ranks
            assert max(row["saved"], row["loaded"]) <= (0 if ranks == 1 else 1.01 * share), row
            assert row["packing"] < 2.5 * share, row
            assert row["times"] == (0 if ranks == 1 else 4), row
