"""The plan against real processes (gloo)."""

import json

import pytest

from tests.distributed.launching import launch


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mixture"), [(2, []), (3, []), (2, ["experts"])])
def test_real_ranks_hold_and_gather_what_is_planned(processes, mixture):
    """After a real step: weights, gradients, moments, averages of rank 0; no other rank holds more."""
    status, output = launch(processes, *mixture, module="tests.planner.shards", timeout=300)
    assert status == 0, output[-2000:]
    found = json.loads(next(x for x in output.splitlines() if x.startswith("RESULT")).removeprefix("RESULT"))
    assert found["state"][0] == found["planned"]
    assert all(held <= most for rank in found["state"] for held, most in zip(rank, found["planned"], strict=True))
    assert found["all_gathered"] == found["planned_gathered"]
    assert found["exchanged"] == found["planned_exchanged"]
    assert bool(mixture) == (found["exchanged"] > 0)
