"""A run directory has one run at a time. The lease itself is tested in tests/system/test_lease.py."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from scmdm.checkpoint.reader import list_checkpoints
from scmdm.errors import InUseError, UserError
from scmdm.runtime.run_lock import acquire_run
from scmdm.runtime.status import read_status
from scmdm.system.lease import acquire, read_lease
from scmdm.system.run_directory import LEASE
from tests.conftest import TINY, scmdm
from tests.kills import last_step

HOLDER = """
import pathlib, sys, time
from scmdm.runtime.run_lock import acquire_run
with acquire_run(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_process(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "mine\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def test_the_owner_is_named_while_it_lives_and_replaced_when_it_is_killed(tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with another_process(run) as holder:
        monkeypatch.delenv("SLURM_JOB_ID")
        with pytest.raises(InUseError) as caught, acquire_run(run):
            pass
        text = str(caught.value)
        assert f"process {holder.pid} of " in text and f" on {socket.gethostname()} in SLURM job 4711" in text
        assert "(scancel 4711)" in text and caught.value.status == 75
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with acquire_run(run):
            assert read_lease(run / LEASE)[1].pid == os.getpid()
    assert read_lease(run / LEASE)[1].released


def test_leftovers_of_a_dead_run_are_removed_so_that_it_cannot_commit_them(tmp_path):
    leftover = tmp_path / "run" / "checkpoints" / ".step_00000004.x.tmp"
    leftover.mkdir(parents=True)
    with acquire_run(tmp_path / "run"):
        assert not leftover.exists()


def test_a_directory_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"run_dir=.*file/run cannot be created"),
        acquire_run(tmp_path / "file" / "run"),
    ):
        pass


def contents(directory):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [directory, *directory.rglob("*")]}


def test_status_leaves_no_trace_and_disturbs_no_start(tmp_path):
    run = tmp_path / "run"
    with acquire_run(run):
        (run / "train.log").touch()
    before = contents(run)
    assert read_status(run).state == "stopped"
    assert contents(run) == before
    looks = "import sys; from pathlib import Path; from scmdm.runtime.status import read_status\n"
    looks += "while True: print(read_status(Path(sys.argv[1])).state, flush=True)"
    with subprocess.Popen([sys.executable, "-c", looks, run], stdout=subprocess.PIPE, text=True) as looking:
        try:
            assert looking.stdout.readline() in ("stopped\n", "running\n")
            for _ in range(50):
                with acquire_run(run):
                    pass
            assert looking.poll() is None
        finally:
            looking.kill()


@pytest.mark.slow
def test_a_suspended_run_that_was_taken_over_writes_nothing_more(molecules, empty_yaml, tmp_path):
    run = tmp_path / "run"
    keys = [*TINY, "train.steps=100000", "train.checkpoint_every=50", "train.log_every=5"]
    process = scmdm("train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", *keys)
    end = time.monotonic() + 120
    while last_step(run) < 10:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    with acquire(run / LEASE, f"run_dir={run}", silence_limit_s=1.0):
        rows, checkpoints = last_step(run), list_checkpoints(run / "checkpoints")
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert f"was taken over by process {os.getpid()}" in errors
        assert last_step(run) == rows and list_checkpoints(run / "checkpoints") == checkpoints
