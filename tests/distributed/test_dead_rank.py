"""One of several ranks dies in an asynchronous save; all ranks meet a full disk and a damaged checkpoint."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from scmdm.checkpoint.reader import list_checkpoints
from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.cli import main
from scmdm.runtime.watchdog import written_stacks
from tests.distributed.launching import command
from tests.distributed.test_missing_rank import free_port
from tests.kills import adapt_arguments, last_step
from tests.processes import popen

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
        ranks.append(popen(command, env={**os.environ, **variables}, **options))
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


def test_what_all_ranks_know_is_reported_once(base, molecules, empty_yaml, tmp_path):
    """A resume skips a damaged checkpoint, and its own saves but the last, which must succeed, exceed a limit."""
    run = tmp_path / "run"
    keys = ["train.checkpoint_every=2", "train.on_save_error=continue", "train.async_checkpoint=true"]
    keys += ["engine=fsdp2", "train.steps=8", "schedule.kind=constant"]
    arguments = adapt_arguments(run, base, molecules, empty_yaml, *keys)
    assert main([*arguments, "train.steps=4"]) == 0
    shard = next((run / "checkpoints/step_00000004/tensors").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = subprocess.run(
        command(2, *arguments),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert done.returncode == 1, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert len([line for line in lines if "step_00000004" in line and shard.name in line]) == 1
    failed = [line for line in lines if "WARNING" in line or line.startswith("cannot write")]
    assert len([line for line in failed if "step_00000006" in line]) == 1, failed
