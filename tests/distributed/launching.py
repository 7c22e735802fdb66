"""The command line in one process or, under torchrun, in several."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


def command(processes, *arguments, module="scmdm"):
    """Command line of scmdm; `processes=0` means without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *launcher, "-m", module, *map(str, arguments)]


def start(processes, *arguments, module="scmdm"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(processes, *arguments, module=module),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(processes, *arguments, timeout=240, module="scmdm"):
    """Run to the end; returns the exit status and the output."""
    process = start(processes, *arguments, module=module)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def workers(process):
    """The ranks that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if "torch.distributed.run" not in _command_line(pid)]


def _command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return "torch.distributed.run"  # it is gone: no rank any more


def wait_for_descendants(process, word):
    """Wait up to two minutes for descendants of `process` whose command contains `word`, and return their pids."""
    end = time.monotonic() + 120
    while not (found := [pid for pid in _descendants(process.pid) if word in _command_line(pid)]):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    return found


def _descendants(pid):
    children = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(place.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def are_gone(pids):
    """Whether processes end within twenty seconds: multiprocessing's tracker ends a moment after its parent."""
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(_runs(pid) for pid in pids)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
