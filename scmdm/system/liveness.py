"""Look up whether a process of this machine, or a SLURM job, is alive."""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
from pathlib import Path

LIVE_JOB_STATES = (
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "COMPLETING",
    "CONFIGURING",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
)

_JOB = re.compile(r"[0-9][0-9_+.]{0,63}")


@functools.cache
def machine_id() -> str:
    """Identify the space in which process ids are unique: this boot of the kernel, and the PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def process_start(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if it is gone or there is no /proc.

    Together with the pid it identifies a process: the kernel reuses pids.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def process_lives(pid: int, start: int | None = None) -> bool:
    """Return whether process `pid` runs on this machine and, if given, began at `start`. Zombies do not count."""
    if pid <= 0:  # these are groups of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    fields = _stat(pid)
    return not fields or (fields[0] not in "ZX" and start in (None, int(fields[19])))


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the command, beginning with the state."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def job_state(job: str) -> str | None:
    """Return the state of a SLURM job as `squeue` prints it; "GONE" for an unknown job, None if squeue fails."""
    if not _JOB.fullmatch(job):
        return None
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--states", "all", "--format", "%T"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return "GONE" if "Invalid job id" in done.stderr else None
    return done.stdout.split()[0] if done.stdout.split() else "GONE"
