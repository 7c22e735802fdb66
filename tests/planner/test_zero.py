"""Planned state and traffic of DeepSpeed's stages, against DeepSpeed with a fake process group."""

import json

import pytest

from tests.distributed.launching import launch

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module", params=[3, 64])
def cases(request):
    status, output = launch(0, request.param, module="tests.planner.zero", timeout=300)
    assert status == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT")).removeprefix("RESULT"))
    assert found
    return found


@pytest.mark.slow
def test_weights_moments_and_averages_are_as_planned_to_the_byte(cases):
    for case in cases:
        for what in ("weights", "moments", "averages", "buckets"):
            assert case["planned"][what] == case["found"][what], (case, what)
        # Without the padding of the last rank's part.
        assert case["planned"]["gradients"] == pytest.approx(case["found"]["gradients"], abs=16), case


@pytest.mark.slow
def test_what_is_sent_is_as_planned(cases):
    """Gradients to the byte (but for padding), gathered weights within 10 %."""
    for case in cases:
        planned, found = case["planned"], case["found"]
        assert planned["all_reduce"] == pytest.approx(found["all_reduce"], rel=1e-3), case
        assert planned["reduce_scatter"] == pytest.approx(found["reduce_scatter"], rel=1e-3), case
        assert planned["all_gather"] == pytest.approx(found["all_gather"], rel=0.1), case
