"""The plan against real processes (gloo)."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_real_ranks_hold_and_gather_what_is_planned(processes):
    """After a real step: weights, gradients, moments, averages of rank 0; no other rank holds more."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "tests.planner.shards"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT")).removeprefix("RESULT"))
    assert found["state"][0] == found["planned"]
    assert all(held <= most for rank in found["state"] for held, most in zip(rank, found["planned"], strict=True))
    assert found["all_gathered"] == found["planned_gathered"]
