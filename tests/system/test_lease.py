"""Leases, held by real processes: one holder at a time, takeover from dead and silent ones, fencing."""

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scmdm.errors import InUseError, UserError
from scmdm.system import lease as module
from scmdm.system.lease import SILENCE_LIMIT_S, LeaseHolder, acquire, holder_lives, read_lease
from scmdm.system.liveness import process_start

CLAIMANT = """
import pathlib, sys
from scmdm.errors import InUseError
from scmdm.system import lease
directory, limit = pathlib.Path(sys.argv[1]), float(sys.argv[2])
lease.HEARTBEAT_S = 0.1
print("ready", flush=True)
sys.stdin.readline()
try:
    with lease.acquire(directory, "run_dir=x", silence_limit_s=limit) as held:
        print("holds", held.fence.generation, flush=True)
        sys.stdin.readline()
        held.fence.require()
        print("commits", flush=True)
except InUseError as error:
    print("refused:", error, flush=True)
"""
LIMIT_S = 4.0  # far above the heartbeat, also on a machine under load


class Claimant:
    """A process that waits for a line before it acquires, and for another before it commits."""

    def __init__(self, directory):
        command = [sys.executable, "-c", CLAIMANT, directory, str(LIMIT_S)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def line(self):
        return self.process.stdout.readline().strip()

    def proceed(self):
        self.process.stdin.write("\n")

    def holds(self):
        assert self.line() == "ready"
        self.proceed()
        return self.line()


@pytest.fixture
def claimants(tmp_path):
    with contextlib.ExitStack() as stack:

        def start():
            claimant = Claimant(tmp_path / "lease")
            stack.enter_context(claimant.process)
            stack.callback(claimant.process.kill)
            return claimant

        yield start


def leave(directory, age_s=0.0, **changes):
    """A lease held by a process elsewhere."""
    directory.mkdir(exist_ok=True)
    newest, _ = read_lease(directory)
    path = directory / f"{1 if newest is None else int(newest.stem) + 1:08d}.json"
    content = dataclasses.asdict(LeaseHolder.current()) | {"host": "elsewhere", "machine": "another"} | changes
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def can_acquire(directory, **options):
    try:
        with acquire(directory, "run_dir=x", **options) as lease:
            assert lease.fence.still_owned()
            return True
    except InUseError:
        return False


@pytest.mark.parametrize("left", ["nothing", "released", "silent", "damaged"])
def test_of_several_processes_exactly_one_acquires(claimants, tmp_path, left):
    if left != "nothing":
        path = leave(tmp_path / "lease", SILENCE_LIMIT_S, released=left == "released")
        if left == "damaged":
            path.write_text("{")
            os.utime(path, (0, 0))
    several = [claimants() for _ in range(4)]
    assert [claimant.line() for claimant in several] == ["ready"] * 4
    for claimant in several:
        claimant.proceed()
    answers = sorted(claimant.line() for claimant in several)
    assert answers[0] == f"holds {1 if left == 'nothing' else 2}"
    assert all(answer.startswith("refused: run_dir=x is in use by process ") for answer in answers[1:]), answers


def test_a_killed_holder_is_replaced_at_once(claimants, tmp_path):
    first = claimants()
    assert first.holds() == "holds 1"
    assert not can_acquire(tmp_path / "lease")
    first.process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)  # it remains a zombie
    with acquire(tmp_path / "lease", "run_dir=x") as lease:
        assert lease.fence.generation == 2 and lease.predecessor.pid == first.process.pid


def test_a_suspended_holder_is_replaced_after_the_limit_and_then_refused(claimants, tmp_path):
    first = claimants()
    assert first.holds() == "holds 1"
    first.process.send_signal(signal.SIGSTOP)
    assert not can_acquire(tmp_path / "lease", silence_limit_s=LIMIT_S)
    time.sleep(LIMIT_S + 0.2)
    with acquire(tmp_path / "lease", "run_dir=x", silence_limit_s=LIMIT_S) as lease:
        first.process.send_signal(signal.SIGCONT)
        first.proceed()
        assert first.line().startswith(f"refused: run_dir=x was taken over by process {os.getpid()} ")
        first.process.wait(10)
        lease.fence.require()  # its release has not disturbed the new holder
    assert read_lease(tmp_path / "lease")[1].pid != first.process.pid


def test_a_holder_that_renews_is_not_replaced(claimants, tmp_path):
    first = claimants()
    assert first.holds() == "holds 1"
    time.sleep(LIMIT_S + 0.2)
    assert not can_acquire(tmp_path / "lease", silence_limit_s=LIMIT_S)
    first.proceed()
    assert first.line() == "commits"
    first.process.wait(10)
    assert can_acquire(tmp_path / "lease")


def test_generations_increase_over_releases(tmp_path):
    for expected in (1, 2, 3):
        with acquire(tmp_path / "lease", "run_dir=x") as lease:
            assert lease.fence.generation == expected and lease.predecessor is None
    assert sorted(path.name for path in (tmp_path / "lease").iterdir()) == [f"0000000{i}.json" for i in (1, 2, 3)]


def test_two_holders_within_one_process(tmp_path):
    with acquire(tmp_path / "lease", "run_dir=x"), pytest.raises(InUseError), acquire(tmp_path / "lease", "run_dir=x"):
        pass


def test_a_holder_elsewhere_is_replaced_after_the_limit(tmp_path):
    leave(tmp_path / "lease", SILENCE_LIMIT_S - 60)
    assert not can_acquire(tmp_path / "lease")
    leave(tmp_path / "lease", SILENCE_LIMIT_S + 60)
    assert can_acquire(tmp_path / "lease")


def test_the_local_clock_does_not_matter(tmp_path, monkeypatch):
    leave(tmp_path / "lease")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert not can_acquire(tmp_path / "lease")
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert not can_acquire(tmp_path / "lease")


def test_a_requeued_job_replaces_its_earlier_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    leave(tmp_path / "lease", job="12")
    assert not can_acquire(tmp_path / "lease"), "another node in the same start of the job"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert can_acquire(tmp_path / "lease")


def test_a_reused_pid_is_another_process():
    me = LeaseHolder.current()
    with subprocess.Popen(["sleep", "60"]) as other:
        holder = dataclasses.replace(me, pid=other.pid, pid_start=process_start(other.pid))
        assert holder_lives(holder, me) is None, "it exists, but may be stopped: its silence decides"
        assert holder_lives(dataclasses.replace(holder, pid_start=holder.pid_start - 1), me) is False
        other.kill()
    assert holder_lives(holder, me) is False


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*absent.*choose another place"):
        acquire(tmp_path / "absent" / "lease", "run_dir=x").__enter__()


def test_heartbeats_set_the_modification_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    with acquire(tmp_path / "lease", "run_dir=x"):
        (path,) = (tmp_path / "lease").iterdir()
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(module.os, "link", refuse)
    with acquire(tmp_path / "lease", "run_dir=x") as held:
        assert read_lease(tmp_path / "lease")[1] is not None
        with pytest.raises(InUseError), acquire(tmp_path / "lease", "run_dir=x"):
            pass
        held.fence.require()
    with acquire(tmp_path / "lease", "run_dir=x") as again:
        assert again.fence.generation == held.fence.generation + 1
