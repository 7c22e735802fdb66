"""Runs that hang, in real processes: the watchdog ends them with the stacks of every rank."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from scmdm.runtime.watchdog import HANG_EXIT
from tests.distributed.launching import are_gone, launch, start, torchrun, workers
from tests.kills import wait_for_step
from tests.processes import wait_until

pytestmark = pytest.mark.slow

MINUTES = 0.1  # four times as long at the start: a slow machine must not look like a hang
LONG = ["train.steps=100000", f"train.watchdog_minutes={MINUTES}", "train.checkpoint_every=1000"]
HALVED = ["train.micro_batch_size=32", *LONG]

HANGS_AS_RANK_1 = """
import sys, time
from pathlib import Path
from scmdm.system.process_group import World
from scmdm.runtime.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), World(1, 2, 0), minutes=0.02):
    time.sleep(600)
"""


def stacks(run):
    return {path.stem: path.read_text() for path in (run / "stacks").glob("rank_*.txt")}


def end_of(process):
    """Output of a process that the watchdog ends within a generous limit."""
    output, _ = process.communicate(timeout=180)
    return output


def test_a_rank_that_hangs_in_a_read_ends_all_ranks_with_their_stacks(adapt, tmp_path):
    run, fifo = tmp_path / "run", tmp_path / "fifo"
    os.mkfifo(fifo)
    odd = ["blocked_read", fifo, *adapt(run, *HALVED)]
    status, output = torchrun(2, *odd, module="tests.distributed.odd_rank")
    assert status != 0 and f"exitcode  : {HANG_EXIT}" in output, output
    found = stacks(run)
    assert set(found) == {"rank_0", "rank_1"}
    assert "read_from_a_disk_that_hangs" in found["rank_1"] and "in data, last step 3" in found["rank_1"]
    assert "all_gather" in found["rank_0"] and "read_from_a_disk_that_hangs" not in found["rank_0"]
    assert all("no progress for" in text and "Thread 0x" in text for text in found.values())
    log = (run / "train.log").read_text()
    assert f"the stacks of all ranks are in {run / 'stacks'}; exit status {HANG_EXIT}" in log
    assert "in data, last step 3: rank 1" in log and "in sync, last step 3: rank 0" in log


@pytest.mark.long
def test_a_stopped_rank_ends_the_job(adapt, tmp_path):
    """In a stopped process the watchdog does not run either, so the launcher must kill it."""
    run = tmp_path / "run"
    process = start(2, *adapt(run, *HALVED))
    wait_for_step(process, run, 5)
    stopped = workers(process)[-1]
    os.kill(stopped, signal.SIGSTOP)
    output = end_of(process)
    assert process.returncode != 0 and f"exitcode  : {HANG_EXIT}" in output, output
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)
    assert "train_step" in stacks(run)["rank_0"]
    assert "no stacks (stopped, or its machine is down): rank 1" in (run / "train.log").read_text()


def test_a_shard_that_cannot_be_read_in_a_loader_process(adapt, molecules, tmp_path):
    """A child of the rank hangs: its stack is written, too, and it ends with the run."""
    run, data, fifo = tmp_path / "run", tmp_path / "qm9", tmp_path / "fifo"
    shutil.copytree(molecules, data)
    os.mkfifo(fifo)
    process = start(0, *adapt(run, *LONG, f"data.path={data}", "data.num_workers=1", "train.micro_batch_size=64"))
    wait_for_step(process, run, 3)
    (shard,) = (data / "train").glob("*.mds")
    os.replace(fifo, shard)
    children = workers(process)
    output = end_of(process)
    assert process.returncode == HANG_EXIT, output
    (text,) = stacks(run).values()
    assert "in data, last step" in text
    assert "get_sample_data" in text.split("--- child process")[1]
    assert are_gone(children)


@pytest.mark.long
def test_a_c_call_that_holds_the_gil(adapt, tmp_path):
    """No Python thread runs then, so faulthandler ends the process, with status 1."""
    run = tmp_path / "run"
    odd = ["stuck_library", "3", *adapt(run, *LONG, "train.micro_batch_size=64")]
    status, output = launch(0, *odd, module="tests.distributed.odd_rank")
    assert status == 1, output
    assert "call_a_library_that_hangs" in stacks(run)["rank_0"]


@pytest.mark.long
def test_a_run_that_was_suspended_as_a_whole_continues(adapt, tmp_path):
    """A suspension for longer than the limit is no hang."""
    run = tmp_path / "run"
    arguments = adapt(run, "train.steps=100", f"train.watchdog_minutes={MINUTES}", "train.micro_batch_size=64")
    process = start(0, *arguments)
    wait_for_step(process, run, 3)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * 60 * MINUTES)
    os.kill(process.pid, signal.SIGCONT)
    output = end_of(process)
    assert process.returncode == 0, output
    assert not (run / "stacks").exists() or not stacks(run)


def test_a_rank_exits_only_after_the_summary_of_rank_0(tmp_path):
    """When the first rank exits, the launcher ends the others, also rank 0, which has still to write its summary."""
    process = subprocess.Popen([sys.executable, "-c", HANGS_AS_RANK_1, tmp_path])
    try:
        wait_until((tmp_path / "stacks" / ".hang").exists, process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        (tmp_path / "stacks" / ".summed").touch()
        assert process.wait(timeout=60) == HANG_EXIT
    finally:
        process.kill()


def test_the_next_start_keeps_the_stacks_of_a_hang(adapt, tmp_path):
    run = tmp_path / "run"
    arguments = adapt(run, "train.micro_batch_size=64", "train.steps=4")
    (run / "stacks").mkdir(parents=True)
    (run / "stacks" / "rank_0.txt").write_text("where it hung\n")
    (run / "stacks" / ".hang").touch()
    assert launch(0, *arguments)[0] == 0
    assert (run / "stacks.before" / "rank_0.txt").read_text() == "where it hung\n"
    assert json.loads((run / "starts.jsonl").read_text())["step"] == 0 and not stacks(run)
