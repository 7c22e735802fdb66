"""A run directory belongs to one run, and to nobody when that is dead."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from scmdm.errors import InUseError
from scmdm.runtime import run_lock as module
from scmdm.runtime.run_lock import SILENT_S, Owner, claim, lives, read_owner

HOLDER = """
import pathlib, sys, time
from scmdm.runtime.run_lock import claim
with claim(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@contextlib.contextmanager
def another_process(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "mine\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def leave_signature(run, age_s=0.0, **changes):
    """What a run on another machine has left there."""
    run.mkdir(exist_ok=True)
    owner = dataclasses.replace(Owner.me(), host="elsewhere", token="other", **changes)
    (run / ".owner.json").write_text(json.dumps(dataclasses.asdict(owner)))
    os.utime(run / ".owner.json", (time.time() - age_s,) * 2)
    return owner


def claimed(run):
    try:
        with claim(run):
            return read_owner(run / ".owner.json").pid == os.getpid()
    except InUseError:
        return False


def test_the_owner_is_named_while_it_lives_and_forgotten_when_it_is_killed(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with another_process(run) as holder:
        monkeypatch.delenv("SLURM_JOB_ID")
        with pytest.raises(InUseError) as caught, claim(run):
            pass
        host = module.Owner.me().host
        assert f"process {holder.pid} of " in str(caught.value) and f" on {host} in SLURM job 4711" in str(caught.value)
        assert "(scancel 4711)" in str(caught.value) and caught.value.status == 75
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (run / ".owner.json").exists() and claimed(run)
    assert not (run / ".owner.json").exists()


def test_an_old_run_without_a_signature_is_respected(run):
    run.mkdir()
    with FileLock(run / ".lock"), pytest.raises(InUseError, match="in use by another process"), claim(run):
        pass
    assert claimed(run)


def test_a_run_elsewhere_counts_as_dead_after_a_long_silence(run):
    leave_signature(run, age_s=SILENT_S - 60)
    assert not claimed(run)
    leave_signature(run, age_s=SILENT_S + 60)
    assert claimed(run)


def test_it_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    with claim(run):
        os.utime(run / ".owner.json", (0, 0))
        end = time.monotonic() + 10
        while (run / ".owner.json").stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_requeued_job_is_not_kept_out_by_itself_before(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    leave_signature(run)
    assert not claimed(run), "another node of the same job in the same life"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claimed(run)


def test_without_a_kernel_lock_the_process_table_decides(run):
    me = Owner.me()
    with subprocess.Popen(["sleep", "60"]) as other:
        neighbour = dataclasses.replace(me, pid=other.pid, token="other")
        assert lives(neighbour, me, run / ".owner.json", kernel_lock=False)
        assert not lives(neighbour, me, run / ".owner.json"), "who holds the kernel's lock knows that nobody else does"
        other.kill()
    assert not lives(neighbour, me, run / ".owner.json", kernel_lock=False)


@pytest.mark.parametrize("left", ["signature", "signature and heir", "unreadable"])
def test_of_many_that_find_a_dead_owner_one_gets_the_directory(run, monkeypatch, left):
    """Without a kernel lock, as on a file system that has none, and with machines that stop to think anywhere."""

    def slowly(function):
        def slow(*args, **options):
            time.sleep(random.choice([0, 0, 0.01, 0.05]))
            return function(*args, **options)

        return slow

    for name in ("lives", "_create", "_last", "read_owner"):
        monkeypatch.setattr(module, name, slowly(getattr(module, name)))
    monkeypatch.setattr(module.os, "rename", slowly(os.rename))
    signature = run / ".owner.json"

    def take(number):
        me = dataclasses.replace(Owner.me(), host=f"machine-{number}", token=str(number))
        try:
            module._sign(run, signature, me, kernel_lock=False)
        except InUseError:
            return None
        return me

    for _ in range(8):
        dead = leave_signature(run, age_s=SILENT_S + 60)
        if left == "signature and heir":
            heir = dataclasses.replace(dead, token="heir")
            (run / f".owner.json.heir-{dead.token}").write_text(json.dumps(dataclasses.asdict(heir)))
            os.utime(run / f".owner.json.heir-{dead.token}", (0, 0))
        if left == "unreadable":
            signature.write_text("")
        with ThreadPoolExecutor(8) as pool:
            owners = [owner for owner in pool.map(take, range(8)) if owner is not None]
        assert [read_owner(signature)] == owners
        signature.unlink()
    assert not list(run.glob(".owner*"))


def test_an_unreadable_signature_does_not_block_for_ever(run):
    run.mkdir()
    (run / ".owner.json").write_text("{")
    assert claimed(run)
