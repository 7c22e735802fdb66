"""The launcher on each machine: arguments of torchrun, environment of ranks, exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scmdm.launch import node
from scmdm.launch.node import SlurmNode, _parser, describe_exit, exit_status, rank_environment, torchrun_arguments
from scmdm.system.signals import REQUEUE_EXIT, stop_signals
from tests.processes import popen, wait_until


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([85, 85], 85),
        ([85, -signal.SIGTERM], 85),  # before its handler was installed, or after its last line
        ([-signal.SIGUSR1], 85),
        ([128 + signal.SIGINT, -signal.SIGTERM], 85),  # a rank that has first ended its own processes
        ([1], 1),
        ([75, 75], 75),
        ([85, 1], 1),
        ([1, -signal.SIGKILL], 137),
        ([-signal.SIGSEGV, 85], 139),
    ],
)
def test_the_status_of_ranks(codes, status):
    assert exit_status(codes) == status


@pytest.mark.parametrize("module", ["node", "rank"])
def test_signals_that_do_not_exist_are_one_line(module):
    command = [sys.executable, "-m", f"scmdm.launch.{module}", "--logs=x", "--stacks=x", "--", "sample"]
    environment = {**os.environ, "SCMDM_STOP_SIGNALS": "TERM,FOO"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "SCMDM_STOP_SIGNALS=TERM,FOO" in done.stderr


def test_exit_codes_as_text():
    assert describe_exit(3) == "exit status 3"
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL (out of memory?)"


def test_the_rank_environment_under_srun():
    task = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}
    assert rank_environment(task, "n1", 1234) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "1234",
    }


@pytest.mark.parametrize(("index", "host"), [(0, "true"), (1, "false")])
def test_the_first_node_hosts_the_rendezvous(tmp_path, index, host):
    given = [
        "--ranks-per-node=4",
        "--head=n1",
        "--port=77",
        f"--logs={tmp_path}",
        f"--stacks={tmp_path}",
        "--start-timeout=9",
    ]
    options = _parser().parse_args([*given, "--", "adapt", "a.yaml"])
    arguments = torchrun_arguments(options, SlurmNode(index, 2, "12", 1))
    for expected in ("--nnodes=2", "--rdzv-endpoint=n1:77", "--rdzv-id=12.1", "--nproc-per-node=4"):
        assert expected in arguments
    assert f"--rdzv-conf=is_host={host},join_timeout=9,read_timeout=9" in arguments
    assert arguments[-4:] == ["-m", "scmdm", "adapt", "a.yaml"]


@pytest.mark.parametrize(("command", "module"), [("adapt", "scmdm"), ("evaluate", "scmdm.launch.rank")])
def test_only_training_handles_signals_by_itself(tmp_path, command, module):
    options = _parser().parse_args([f"--logs={tmp_path}", f"--stacks={tmp_path}", "--", command, "model"])
    assert torchrun_arguments(options, SlurmNode(0, 1, "12", 1))[-4:] == ["-m", module, command, "model"]


def test_a_signal_that_was_blocked_ends_a_rank_that_does_not_train():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        process = subprocess.Popen([sys.executable, "-m", "scmdm.launch.rank", "doctor"], stdout=subprocess.DEVNULL)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == -signal.SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_ranks_inherit_nccls_recorder_beside_the_stacks(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(node, "_become_rank", lambda _: found.update(os.environ) or sys.exit(0))
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    given = ["--starter=srun", f"--logs={tmp_path}", f"--stacks={tmp_path / 'run/stacks'}", "--", "adapt", "a.yaml"]
    try:
        with pytest.raises(SystemExit):
            node.main(given)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    assert Path(found["TORCH_FR_DUMP_TEMP_FILE"]).parent == tmp_path / "run/stacks"
    assert (tmp_path / "run/stacks").is_dir()
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0", "the user's own value"
    assert int(found["TORCH_FR_BUFFER_SIZE"]) > 0 and int(found["TORCH_NCCL_ASYNC_ERROR_HANDLING"]) > 0


@pytest.mark.slow
def test_a_signal_before_the_ranks_are_started_reaches_them(tmp_path):
    """The launcher imports torch when it comes. Without it, the rank would end with status 1."""
    given = ["--logs", tmp_path / "logs", "--stacks", tmp_path / "stacks", "--", "sample", tmp_path / "missing"]
    process = popen(
        [sys.executable, "-m", "scmdm.launch.node", *map(str, given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: _blocks(process, signal.SIGUSR1), process)
    assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == REQUEUE_EXIT, output


def _blocks(process, number):
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("SigBlk:")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
