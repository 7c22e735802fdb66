"""Whether somebody still works: a process of this machine, or a SLURM job anywhere."""

from __future__ import annotations

import os
import subprocess

JOB_LIVES = ("RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING")


def process_lives(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def job_state(job: str) -> str | None:
    """SLURM's word for the state of a job ("GONE": it knows none of that number); None when there is no asking it."""
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
