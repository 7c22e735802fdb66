"""A rank that dies in the middle of an asynchronous save: the other one reports the failed save and ends."""

import os
import signal
import subprocess
import sys

import pytest

from scmdm.checkpoint.reader import list_checkpoints
from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.runtime.watchdog import written_stacks
from tests.distributed.test_missing_rank import free_port
from tests.kills import adapt_arguments, last_step

pytestmark = pytest.mark.slow


def test_a_rank_that_dies_in_a_save_makes_it_a_failed_save(base, molecules, empty_yaml, tmp_path):
    """Without a launcher, which would end the other rank."""
    run, port = tmp_path / "run", str(free_port())
    keys = ["train.steps=400", "train.checkpoint_every=4", "train.async_checkpoint=true", "engine=fsdp2"]
    keys += ["train.watchdog_minutes=5", "train.on_save_error=continue"]
    odd = ["killed_in_a_save", "8", *adapt_arguments(run, base, molecules, empty_yaml, *keys)]
    ranks = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.distributed.odd_rank", *odd]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen(command, env={**os.environ, **variables}, **options))
    output = ranks[0].communicate(timeout=240)[0]
    ranks[1].communicate(timeout=20)
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 1, output
    (found,) = list_checkpoints(run / "checkpoints")
    assert found.name == "step_00000004" and verify_checkpoint(found) == []
    assert not list((run / "checkpoints").glob(".step_*"))
    assert last_step(run) >= 8 and written_stacks(run) == []
    warnings = [line for line in (run / "train.log").read_text().splitlines() if "WARNING" in line]
    assert any("step_00000008" in line for line in warnings), output
