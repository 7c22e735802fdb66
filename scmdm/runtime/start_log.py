"""Append-only log of a run's starts, one JSON line each: `starts.jsonl`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scmdm.observability.run_metrics import read_metrics
from scmdm.runtime.preflight import PreflightReport
from scmdm.system.run_directory import ENVIRONMENT_FILE, STARTS_FILE


def record_start(directory: Path, preflight: PreflightReport, step: int) -> None:
    """Append a start at `step`. `environment.json` must already describe this start."""
    environment = json.loads((directory / ENVIRONMENT_FILE).read_text())
    entry = {
        "time": time.time(),
        "step": step,
        "world_size": len(preflight.hosts),
        **asdict(preflight),
        "hosts": list(dict.fromkeys(preflight.hosts)),
        "host": preflight.hosts[0],
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "git": environment["git"],
    }
    with (directory / STARTS_FILE).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """Read all starts, oldest first, except lines that a crash has truncated."""
    return read_metrics(directory / STARTS_FILE)
