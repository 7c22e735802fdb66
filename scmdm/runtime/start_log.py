"""Every start of a run, one JSON line each, never rewritten: `starts.jsonl`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scmdm.observability.metrics import read_metrics
from scmdm.runtime.preflight import Started

STARTS_FILE = "starts.jsonl"


def record_start(directory: Path, started: Started, step: int) -> None:
    """Append what began here: a run at `step`. Reads `environment.json`, which must be that of this start."""
    environment = json.loads((directory / "environment.json").read_text())
    entry = {
        "time": time.time(),
        "step": step,
        "world_size": len(started.hosts),
        **asdict(started),
        "hosts": list(dict.fromkeys(started.hosts)),
        "host": started.hosts[0],
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "git": environment["git"],
    }
    with (directory / STARTS_FILE).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """All starts, oldest first; a line that a crash cut short is left out."""
    return read_metrics(directory / STARTS_FILE)
