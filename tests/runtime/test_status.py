"""`scmdm status` and `scmdm report` of running, killed, finished and damaged runs."""

import dataclasses
import json
import os
import shutil
import socket
import stat
import time

import pytest

from scmdm.checkpoint.reader import list_checkpoints
from scmdm.cli import main
from scmdm.errors import UserError
from scmdm.runtime.status import _eta, describe_status, read_status
from scmdm.system.lease import LeaseHolder
from scmdm.system.liveness import job_state
from tests.conftest import TINY, scmdm
from tests.kills import wait_for_step


def arguments_of(run, molecules, empty_yaml, *overrides):
    return ["train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", *TINY, *overrides]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, molecules, empty_yaml):
    """A run that was started, stopped, started again, looked at by both commands while it went on, and killed."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    assert main(arguments_of(run, molecules, empty_yaml, "train.steps=4")) == 0
    process = scmdm(*arguments_of(run, molecules, empty_yaml, "train.steps=100000"))
    wait_for_step(process, run, 12)
    looks = {"pid": process.pid, "live": read_status(run), "report": main(["report", str(run)])}
    looks["html"] = (run / "report.html").read_text()
    assert process.poll() is None
    process.kill()
    process.communicate()
    return run, looks


@pytest.mark.slow
def test_a_run_that_goes_on(killed):
    run, looks = killed
    status = looks["live"]
    assert status.state == "running" and status.step >= 12 and status.steps == 100000
    assert status.loss > 0 and status.tokens_per_s > 0 and status.eta_s > 0 and status.metrics_age_s < 60
    assert status.owner.pid == looks["pid"] and status.owner.host == socket.gethostname() and status.owner.job is None
    assert status.starts == 2 and status.last_start.step == 4
    assert status.checkpoint.step >= 4 and status.checkpoint.verified == "SHA-256" and status.checkpoint.damaged == []
    assert status.stacks == [] and status.warnings == []
    lines = describe_status(status)
    assert lines[0].startswith(f"{run}: running (process {looks['pid']} of ")
    assert lines[0].endswith(f" on {socket.gethostname()})")
    assert any(line.startswith("starts       2 (1 restart(s)), the last ") for line in lines)


@pytest.mark.slow
def test_the_report_of_a_run_that_goes_on(killed):
    _, looks = killed
    assert looks["report"] == 0
    assert " of 100,000, " in looks["html"] and looks["html"].rstrip().endswith("</html>")


@pytest.mark.slow
def test_a_run_that_was_killed(killed, capsys):
    run, _ = killed
    status = read_status(run)
    assert status.state == "stopped" and status.eta_s is None
    assert main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "stopped" and found["checkpoint"]["step"] == status.checkpoint.step
    assert main(["status", str(run), "--quick"]) == 0
    assert "verified by sizes" in capsys.readouterr().out


def test_a_finished_run(base, capsys):
    assert main(["status", str(base)]) == 0
    out = capsys.readouterr().out
    assert ": finished (last: " in out and "6 of 6 (100.0 %)" in out and "step 6, " in out


@pytest.fixture
def copy(base, tmp_path):
    """A finished run whose configuration asks for more steps."""
    run = tmp_path / "run"
    shutil.copytree(base, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  steps: 6\n", "  steps: 100\n"))
    return run


def test_half_written_rows_and_damaged_checkpoints(copy, capsys):
    step = read_status(copy).step
    for name in ("metrics.jsonl", "starts.jsonl"):
        with (copy / name).open("a") as file:
            file.write('{"kind": "train", "st')
    newest = list_checkpoints(copy / "checkpoints")[-1]
    with (newest / "model.json").open("a") as file:
        file.write(" ")
    status = read_status(copy)
    assert (status.step, status.starts) == (step, 1)
    assert status.checkpoint.step < int(newest.name.removeprefix("step_"))
    assert len(status.checkpoint.damaged) == 1 and "model.json" in status.checkpoint.damaged[0]
    assert main(["report", str(copy)]) == 0
    checkpoints = list_checkpoints(copy / "checkpoints")
    for path in checkpoints:
        (path / "model.json").write_text("")
    status = read_status(copy)
    damaged = [text for text in status.damaged if "model.json" in text]
    assert status.checkpoint is None and len(damaged) == len(checkpoints) > 1
    assert all(any(text in line for line in describe_status(status)) for text in damaged)
    shutil.rmtree(copy / "checkpoints")
    assert read_status(copy).checkpoint is None
    assert any("none intact yet" in line for line in describe_status(read_status(copy)))
    assert main(["report", str(copy)]) == 0


def test_missing_files(copy):
    """As in a run that has just started, or one of an older scmdm."""
    for name in ("starts.jsonl", "config.yaml", "environment.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / ".lease")
    (copy / "metrics.jsonl").write_text("")
    status = read_status(copy)
    assert (status.step, status.steps, status.loss, status.starts, status.owner) == (0, None, None, 0, None)
    assert status.state == "stopped" and describe_status(status)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_status(copy.parent)


def test_warnings_and_stacks_are_shown(copy):
    with (copy / "train.log").open("a") as file:
        for number in range(5):
            file.write(f"2026-01-01 00:00:00,000 WARNING number {number}\n2026-01-01 00:00:00,000 INFO WARNING no\n")
    (copy / "stacks").mkdir(exist_ok=True)
    (copy / "stacks" / "rank_3.txt").write_text("=== \n")
    status = read_status(copy)
    assert [line.rpartition(" ")[2] for line in status.warnings] == ["2", "3", "4"]
    assert status.stacks == [str(copy / "stacks" / "rank_3.txt")]


def leave_lease(run, age_s=0.0, **changes):
    """The run's lease as its newest holder left it."""
    lease = run / ".lease" / "00000009.json"
    lease.parent.mkdir(exist_ok=True)
    lease.write_text(json.dumps(dataclasses.asdict(LeaseHolder.current()) | changes))
    os.utime(lease, (time.time() - age_s,) * 2)


@pytest.mark.parametrize(
    ("holder", "age_s", "state"),
    [
        ({"machine": "another", "pid": 1}, 10, "running"),
        ({"machine": "another", "pid": 1}, 3600, "silent"),
        ({"machine": "another", "pid": 1, "released": True}, 10, "stopped"),
        ({"pid": 2**22 + 1}, 10, "stopped"),
        ({}, 10, "running"),
        ({"pid_start": 1}, 10, "stopped"),  # another process has the pid now
        ({"released": True}, 10, "stopped"),
    ],
)
def test_the_state_follows_from_the_lease(copy, holder, age_s, state):
    leave_lease(copy, age_s, **holder)
    assert read_status(copy).state == state


def test_a_damaged_lease(copy):
    leave_lease(copy)
    (copy / ".lease" / "00000009.json").write_text('["no holder"]')
    assert read_status(copy).state == "running"
    os.utime(copy / ".lease" / "00000009.json", (0, 0))
    assert read_status(copy).state == "silent"


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**70},
        {"pid": -1},
        {"pid": 0},
        {"pid": "1"},
        {"job": "--help"},
        {"job": "1\0"},
        {"user": "\x1b[2J"},
        {"more": 1},
        {"since": None},
        {"released": "no"},
    ],
)
def test_a_lease_that_no_run_wrote(copy, changes, capsys):
    leave_lease(copy, **changes)
    assert main(["status", str(copy)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_other_files_beside_the_leases(copy, molecules, empty_yaml):
    """The newest lease is that of the highest number."""
    for name in ("a.json", "-1.json", "99999999x.json", "٣٣٣٣٣٣٣٣.json", "0000000100000000.json.tmp"):
        (copy / ".lease" / name).write_text("{}")
    assert read_status(copy).owner is not None
    assert main(arguments_of(copy, molecules, empty_yaml, "train.steps=7")) == 0
    assert read_status(copy).step == 7


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl", "starts.jsonl", "config.yaml", ".lease"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_a_file_that_cannot_be_read_does_not_stop_status(copy, name, make):
    """A FIFO would block it for ever."""
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    make(copy / name)
    assert main(["status", str(copy), "--json"]) == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("echo RUNNING", "running"), ("exit 0", "stopped"), ("echo 'Invalid job id' >&2; exit 1", "stopped")],
)
def test_the_scheduler_knows_of_a_job_on_another_machine(copy, answer, expected, tmp_path, monkeypatch):
    """A script stands in for squeue and answers as its manual says. The real one: tests/slurm."""
    script = tmp_path / "bin" / "squeue"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n{answer}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    leave_lease(copy, machine="another", pid=1, job="42")
    status = read_status(copy)
    assert status.state == expected and status.owner.job == "42"
    assert status.owner.job_state == ("RUNNING" if expected == "running" else "GONE")


def test_without_a_scheduler_nothing_is_known_of_a_job(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_state("42") is None


def test_time_left():
    """100 tokens a step, 50 tokens a second: two seconds for each of the 90 steps that are left."""
    assert _eta({"step": 10, "tokens": 1000, "tokens_per_s": 50.0}, 100) == 180
    assert _eta({"step": 10, "tokens": 1000, "tokens_per_s": 0.0}, 100) is None
    assert _eta({}, 100) is None
