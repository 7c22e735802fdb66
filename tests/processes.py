"""Processes that tests start, and waiting for what they do. What a failed test leaves running is killed."""

import atexit
import itertools
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

_MARK = "STARTED_BY_TESTS"  # variable that descendants inherit, also those in sessions of their own
_number = itertools.count()
_marks: dict[subprocess.Popen, str] = {}


def popen(command, *, env=None, **options):
    """Start a process that `end` kills with all its descendants: after the test, or with the session at the latest."""
    mark = f"{os.getpid()}.{next(_number)}"
    process = subprocess.Popen(command, env={**(os.environ if env is None else env), _MARK: mark}, **options)
    _marks[process] = mark
    return process


def started():
    """The processes that `popen` has started and `end` has not killed."""
    return list(_marks)


def end(processes):
    """Kill processes and their descendants, as far as they still run."""
    marks = {f"{_MARK}={_marks.pop(process)}".encode() for process in processes}
    while marks and (found := _with_variable(marks)):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.poll()  # a killed child stays until its status is read


atexit.register(lambda: end(started()))


def _with_variable(assignments):
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            if not assignments.isdisjoint((place / "environ").read_bytes().split(b"\0")):
                found.append(int(place.name))
    return found


def wait_until(condition, process=None, limit=240):
    """Wait for a true value of `condition()` and return it; fail if `process` ends or `limit` seconds pass before."""
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate(timeout=20)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def children(pid):
    """Ids of the processes that a process has started and that still run."""
    return _children().get(pid, [])


def descendants(pid):
    """Ids of the children of a process, of their children, and so on."""
    by_parent, found = _children(), [pid]
    for parent in found:
        found += by_parent.get(parent, [])
    return found[1:]


def _children():
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(place.name))
    return found
