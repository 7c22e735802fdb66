"""The command line in one process or in several: as ranks of torchrun, or as forks of a process that has imported it.

An import of torch and scmdm takes longer than most of what the ranks of a test compute.
"""

import atexit
import functools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from tests.processes import children, descendants, end, popen, wait_until

IMPORTED = [
    "scmdm.cli",
    "scmdm.distributed.fsdp",
    "scmdm.evaluation.evaluate",
    "scmdm.sampling.generation",
    "scmdm.training.trainer",
    "torch._dynamo",
]
_TERMINATED_S = 30  # from SIGTERM to SIGKILL, as of torchrun


def command(processes, *arguments, module="scmdm"):
    """Command line of scmdm; `processes=0` means without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *launcher, "-m", module, *map(str, arguments)]


def start(processes, *arguments, module="scmdm"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return popen(
        command(processes, *arguments, module=module),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def torchrun(processes, *arguments, timeout=240, module="scmdm"):
    """Run to the end under torchrun; returns the exit status and the output."""
    process = start(processes, *arguments, module=module)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        end([process])
    return process.returncode, output


def launch(processes, *arguments, timeout=240, module="scmdm"):
    """Run to the end in forks, which have the variables of torchrun unless `processes=0`; returns status and output.

    As with torchrun, a rank that fails ends the others.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes else None
    ranks = []
    with tempfile.NamedTemporaryFile() as output:
        for rank in range(max(1, processes)):
            given = (module, [*map(str, arguments)], os.getcwd(), _variables(rank, processes, store), output.name)
            ranks.append(_forks().Process(target=_run, args=given))
            ranks[-1].start()
        try:
            assert _wait(ranks, time.monotonic() + timeout), Path(output.name).read_text(errors="replace")
        finally:
            _end(ranks)
        return _status(ranks, processes), Path(output.name).read_text(errors="replace")


@functools.cache
def _forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read by the import of torch
        forkserver.ensure_running()
    return context


def _variables(rank, processes, store):
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    if store is not None:
        found |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        found |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in found.items()}


def _run(module, arguments, directory, variables, output):
    """Do what `python -m MODULE ARGUMENTS`, or `python SCRIPT ARGUMENTS`, does, in a fork."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(directory)
    sys.argv[1:] = arguments
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not


def _end_with_the_tests():
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _wait(ranks, end):
    """Return whether all have ended, or one has failed, in time."""
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        ended = [running.pop(one) for one in multiprocessing.connection.wait(running, end - time.monotonic())]
        for rank in ended:
            rank.join()
        if not ended or any(rank.exitcode for rank in ended):
            return bool(ended)
    return True


def _end(ranks):
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join(_TERMINATED_S)
        rank.kill()
        rank.join()


def _status(ranks, processes):
    return int(any(rank.exitcode for rank in ranks)) if processes else ranks[0].exitcode


def workers(process):
    """The ranks that torchrun has started."""
    return [pid for pid in children(process.pid) if "torch.distributed.run" not in _command_line(pid)]


def _command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return "torch.distributed.run"  # it is gone: no rank any more


def wait_for_descendants(process, word):
    """Wait for descendants of `process` whose command contains `word`, and return their pids."""
    return wait_until(lambda: [pid for pid in descendants(process.pid) if word in _command_line(pid)], process)


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
    except (FileNotFoundError, ProcessLookupError):
        return False
