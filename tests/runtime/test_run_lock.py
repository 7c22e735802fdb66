"""A run directory has one run at a time. The lease itself is tested in tests/system/test_lease.py."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from scmdm.checkpoint.reader import checkpoint_name
from scmdm.checkpoint.retention import remove_old_checkpoints
from scmdm.config.training import PROFILED_STEPS, TrainConfig
from scmdm.errors import InUseError, UserError
from scmdm.observability.run_metrics import LogFile, MetricsFile
from scmdm.observability.step_timer import Profiler
from scmdm.runtime.run_lock import acquire_run
from scmdm.runtime.status import read_status
from scmdm.runtime.watchdog import Watchdog
from scmdm.system.lease import read_lease
from scmdm.system.line_file import LineFile
from scmdm.system.process_group import World
from scmdm.system.run_directory import CHECKPOINTS, LEASE
from tests.conftest import TINY
from tests.distributed.launching import start, workers
from tests.kills import wait_for_step

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


def test_of_several_starts_at_once_one_runs_and_the_others_find_it_in_use(tmp_path):
    starts, rounds = 8, 30
    together, lock, found = threading.Barrier(starts), threading.Lock(), []

    def start():
        for number in range(rounds):
            together.wait(60)
            try:
                with acquire_run(tmp_path / str(number)):
                    together.wait(60)
            except InUseError as error:
                together.wait(60)
                with lock:
                    found.append(error.status)

    with ThreadPoolExecutor(starts) as pool:
        for start_of_a_thread in [pool.submit(start) for _ in range(starts)]:
            start_of_a_thread.result()
    assert found == [75] * rounds * (starts - 1)


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


def snapshot(run):
    """Name, size and content of everything in a run but the files of the lease's first generation."""
    paths = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "00000001.json"]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    "keys", [["train.checkpoint_every=3"], ["train.profile_step=40", "train.log_every=7"]], ids=str
)
def test_a_suspended_run_that_was_taken_over_writes_nothing_more(processes, keys, molecules, empty_yaml, tmp_path):
    """Wherever it is suspended: in a save, in a step, or while it logs."""
    run = tmp_path / "run"
    keys = [*TINY, "train.steps=100000", "train.watchdog_minutes=0.5", *keys]
    process = start(processes, "train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", *keys)
    ranks = []
    try:
        wait_for_step(process, run, 20)
        ranks = workers(process) if processes else [process.pid]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        lease, _ = read_lease(run / LEASE)
        os.utime(lease, (0, 0))  # as after minutes of silence
        with acquire_run(run):
            before = snapshot(run)
            assert {"metrics.jsonl", "train.log", "starts.jsonl", "config.yaml"} <= before.keys()
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)
            output, _ = process.communicate(timeout=120)
            assert process.returncode != 0 if processes else process.returncode == 75, output
            assert f"was taken over by process {os.getpid()}" in output
            assert snapshot(run) == before
    finally:
        for pid in ranks if process.poll() is None else ():
            os.kill(pid, signal.SIGCONT)
        process.kill()
        process.communicate()


@pytest.mark.parametrize("writer", ["metrics", "log", "starts", "trace", "watchdog", "removal"])
def test_every_writer_of_a_run_stops_when_it_is_taken_over(writer, tmp_path):
    """Also what waited for room on a full disk."""
    run = tmp_path / "run"
    with acquire_run(run) as lease:
        write = WRITERS[writer](run, lease.fence)
        (run / LEASE / "00000002.json").write_text("{}")
        before = snapshot(run)
        with contextlib.suppress(InUseError):
            write()
        assert snapshot(run) == before


def _metrics(run, fence):
    file = MetricsFile(run / "metrics.jsonl", 0, keep_going=True, fence=fence)
    return lambda: (file.write({"kind": "train", "step": 1}), file.close())


def _log(run, fence):
    handler = LogFile(run / "train.log", fence)
    record = logging.LogRecord("scmdm", logging.INFO, "", 0, "text", None, None)
    handler.emit(record)
    return lambda: (handler.emit(record), handler.close())


def _starts(run, fence):
    file = LineFile(run / "starts.jsonl", fence)
    file.write("1")
    return lambda: (file.write("2"), file.close())


def _trace(run, fence):
    profiler = Profiler(run, 1, 0, fence)
    profiler.before(1)
    return lambda: profiler.after(PROFILED_STEPS)


def _watchdog(run, fence):
    watchdog = Watchdog(run, World(0, 1, 0), 100, fence)
    watchdog.__enter__()
    return lambda: watchdog.__exit__()


def _removal(run, fence):
    """A checkpoint of the new owner."""
    for step in (1, 2, 3):
        (run / CHECKPOINTS / checkpoint_name(step)).mkdir(parents=True)
        (run / CHECKPOINTS / checkpoint_name(step) / "file").touch()
    newest = run / CHECKPOINTS / checkpoint_name(3)
    keep = TrainConfig(steps=3, keep_last=1)
    return lambda: remove_old_checkpoints(run / CHECKPOINTS, newest, keep, None, before=fence.require)


WRITERS = {
    "metrics": _metrics,
    "log": _log,
    "starts": _starts,
    "trace": _trace,
    "watchdog": _watchdog,
    "removal": _removal,
}
