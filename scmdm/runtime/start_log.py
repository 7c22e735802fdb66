"""Append-only log of a run's starts, one JSON line each: `starts.jsonl`."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scmdm.observability.run_metrics import logger
from scmdm.runtime.preflight import PreflightReport
from scmdm.system.files import json_text
from scmdm.system.json_lines import JsonLines, read_json_lines
from scmdm.system.lease import Fence
from scmdm.system.line_file import LineFile
from scmdm.system.run_directory import ENVIRONMENT_FILE, STARTS_FILE
from scmdm.system.untrusted import describe, parse_as, parse_json, read_json


@dataclass(frozen=True)
class StartRecord:
    """A start of a run."""

    time: float  # Unix time
    step: int
    world_size: int
    hosts: list[str]
    source_sha256: str
    seconds: float
    skew_s: float
    all_reduce_gb_per_s: float | None
    all_reduce_latency_us: float | None
    warnings: list[str]
    host: str
    pid: int
    slurm_job_id: str | None
    git: dict[str, Any] | None


def record_start(directory: Path, preflight: PreflightReport, step: int, fence: Fence | None = None) -> None:
    """Append a start at `step`; without room for it, log a warning. `environment.json` must describe this start."""
    entry = StartRecord(
        time=time.time(),
        step=step,
        world_size=len(preflight.hosts),
        hosts=list(dict.fromkeys(preflight.hosts)),
        source_sha256=preflight.source_sha256,
        seconds=preflight.seconds,
        skew_s=preflight.skew_s,
        all_reduce_gb_per_s=preflight.all_reduce_gb_per_s,
        all_reduce_latency_us=preflight.all_reduce_latency_us,
        warnings=list(preflight.warnings),
        host=preflight.hosts[0],
        pid=os.getpid(),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        git=read_json(directory / ENVIRONMENT_FILE, "environment")["git"],
    )
    file = LineFile(directory / STARTS_FILE, fence)
    file.write(json_text(asdict(entry)))
    error = file.close()
    if error is not None:
        logger.warning("cannot write %s: %s; this start is not recorded", file.path, describe(error))


def read_starts(directory: Path) -> JsonLines[StartRecord]:
    """Read all starts, oldest first. Lines that are not starts are counted."""
    path = directory / STARTS_FILE
    return read_json_lines(path, lambda line: parse_as(StartRecord, parse_json(line), path))
