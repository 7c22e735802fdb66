"""The command line in one process or, under torchrun, in several."""

import os
import subprocess
import sys
import time


def command(processes, *arguments, module="scmdm"):
    """`processes` 0: without torchrun."""
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
    except FileNotFoundError:
        return "torch.distributed.run"  # it is gone: no rank any more


def are_gone(pids):
    """Within twenty seconds: multiprocessing's tracker ends a moment after the process whose child it is."""
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
