"""The launcher on each machine: arguments of torchrun, environment of ranks, exit status."""

import signal

import pytest

from scmdm.launch.node import SlurmNode, _parser, describe_exit, exit_status, rank_environment, torchrun_arguments


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([85, 85], 85),
        ([85, -signal.SIGTERM], 85),  # before its handler was installed, or after its last line
        ([-signal.SIGUSR1], 85),
        ([1], 1),
        ([75, 75], 75),
        ([85, 1], 1),
        ([1, -signal.SIGKILL], 137),
        ([-signal.SIGSEGV, 85], 139),
    ],
)
def test_the_status_of_ranks(codes, status):
    assert exit_status(codes) == status


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
    given = ["--ranks-per-node=4", "--head=n1", "--port=77", f"--logs={tmp_path}", "--start-timeout=9"]
    options = _parser().parse_args([*given, "--", "adapt", "a.yaml"])
    arguments = torchrun_arguments(options, SlurmNode(index, 2, "12", 1))
    for expected in ("--nnodes=2", "--rdzv-endpoint=n1:77", "--rdzv-id=12.1", "--nproc-per-node=4"):
        assert expected in arguments
    assert f"--rdzv-conf=is_host={host},join_timeout=9,read_timeout=9" in arguments
    assert arguments[-4:] == ["-m", "scmdm", "adapt", "a.yaml"]
