"""Expert parallelism: steps of real ranks that share the experts of each layer, beside those of one process."""

import json

import pytest

from tests.distributed.launching import launch

pytestmark = pytest.mark.slow


def results(ranks, *cases):
    status, output = launch(ranks, *cases, module="tests.distributed.expert_steps")
    assert status == 0, output[-3000:]
    found = [json.loads(line.removeprefix("RESULT")) for line in output.splitlines() if line.startswith("RESULT")]
    assert [f"{one['case']}={one['experts']}" for one in found] == list(cases)
    return found


def assert_equal(found):
    """Losses, norms, gradients before and after they are clipped, weights and averages, and the same collectives."""
    for one in found:
        assert one["loss"] < 1e-5 and one["norm"] < 1e-5 and one["loads"], one
        assert all(one[kind] < 2e-5 for kind in ("first", "clipped", "weights", "ema")), one
        assert one.get("frozen", 0) < 1e-6, one
        assert len(set(one["exchanges"])) == 1 and one["exchanges"][0] > 0, one


def test_two_ranks_step_as_one_process():
    assert_equal(results(2, "injected=2", "adapters=2"))


def test_four_ranks_step_as_one_process():
    """Also where all tokens go to two experts of the first rank."""
    found = results(4, "accumulated=2", "base=4", "two experts alone=4")
    assert_equal(found)
    assert found[-1]["least_rows"][0] > 0 and found[-1]["least_rows"][1:] == [0, 0, 0]


@pytest.mark.long
def test_replicas_contexts_offloading_and_compilation():
    assert_equal(results(4, "plain=2", "last layer=2", "replicated=2", "in context=2", "compiled=2"))
    (found,) = results(4, "bfloat16=4")
    assert found["loss"] < 5e-3 and found["norm"] < 0.05
