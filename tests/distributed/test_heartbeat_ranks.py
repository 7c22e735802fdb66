"""Evaluations whose ranks wait for each other, in real processes without a launcher that would end them all."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from scmdm.runtime.watchdog import HANG_EXIT
from scmdm.system.rank_heartbeat import LOST_RANK_EXIT

pytestmark = pytest.mark.slow
BOUND_S = 60  # from the death of a rank to the end of the others; its silence is noticed after ten seconds


@contextlib.contextmanager
def evaluation(ranks, slow_rank, seconds, model, data, place):
    """Processes of an evaluation, one of whose ranks computes for longer; ended at the end of the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    keys = [
        f"data={data}",
        "domain=text",
        "nelbo_samples=8",
        "num=0",
        "device=cpu",
        "precision=float32",
        "batch_size=4",
    ]
    given = [slow_rank, seconds, place / "begun", "evaluate", model, f"out={place / 'out.json'}", "device=cpu", *keys]
    launcher = {"WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = []
    try:
        for rank in range(ranks):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, **launcher}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed.quick_heartbeat", *map(str, given)],
                    env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(path, processes):
    end = time.monotonic() + 400
    while not path.exists():
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.long
def test_a_slow_rank_is_waited_for_beyond_every_limit(base, molecules, tmp_path):
    """It computes for three times as long as a collective may take, and longer than a rank may be silent."""
    with evaluation(2, 1, 15, base, molecules, tmp_path) as processes:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "out.json").is_file()


@pytest.mark.parametrize(
    ("lost", "by"),
    [
        pytest.param(1, signal.SIGKILL, id="kill1"),
        pytest.param(0, signal.SIGKILL, id="kill0", marks=pytest.mark.long),
        pytest.param(0, signal.SIGSTOP, id="stop0", marks=pytest.mark.long),
    ],
)
def test_a_dead_rank_ends_the_others_which_name_it(base, molecules, tmp_path, lost, by):
    """Rank 0 serves the store: without it, or while it is stopped, nothing answers."""
    with evaluation(3, lost, 600, base, molecules, tmp_path) as processes:
        wait_for(tmp_path / "begun", processes)
        os.kill(processes[lost].pid, by)
        died = time.monotonic()
        for rank in {0, 1, 2} - {lost}:
            output, _ = processes[rank].communicate(timeout=400)
            assert processes[rank].returncode == LOST_RANK_EXIT, output
            assert f"rank {lost} " in output
        assert time.monotonic() - died < BOUND_S
    assert not (tmp_path / "out.json").exists()


def test_a_rank_that_hangs_ends_with_its_stacks_and_the_others_name_it(base, molecules, tmp_path, monkeypatch):
    """Its heartbeat goes on. The other rank has done its share and waits."""
    monkeypatch.setenv("HANG_MINUTES", "0.1")
    with evaluation(2, 1, 600, base, molecules, tmp_path) as processes:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [LOST_RANK_EXIT, HANG_EXIT], outputs
    assert "rank 1 " in outputs[0] and "rank 1 " in outputs[1]
    (stacks,) = tmp_path.glob(".out.json.parts/stacks/rank_1.txt")
    assert "quick_heartbeat.py" in stacks.read_text() and not (tmp_path / "out.json").exists()
