"""Grouped attention of sequences that ranks share."""

import json

import pytest

from tests.distributed.launching import launch


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_are_those_of_one_process_and_keys_are_not_expanded(ranks):
    status, output = launch(ranks, module="tests.distributed.grouped_slices")
    assert status == 0, output
    line = next(line for line in output.splitlines() if line.startswith("RESULT"))
    for row in json.loads(line.removeprefix("RESULT")):
        assert row["difference"] <= 2e-6, row
        assert row["sent"] == row["wanted"], row
        assert row["kv"] == row["heads"] or sum(row["sent"]) < 4 * row["heads"], row
