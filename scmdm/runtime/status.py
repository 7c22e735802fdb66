"""`scmdm status`: the state of a run, read from its directory on any machine, by any user.

Files may be incomplete, missing, or written by an older scmdm. The command writes and locks nothing, so that it cannot
disturb the run or another start.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmdm.checkpoint.reader import list_checkpoints, step_of
from scmdm.checkpoint.seal import SEAL, verify_checkpoint
from scmdm.config.fields import require
from scmdm.config.stored import read_stored_config
from scmdm.errors import UserError
from scmdm.observability.run_metrics import format_duration, read_metrics
from scmdm.runtime.start_log import StartRecord, read_starts
from scmdm.runtime.watchdog import written_stacks
from scmdm.system.lease import SILENCE_LIMIT_S, LeaseHolder, read_lease
from scmdm.system.liveness import LIVE_JOB_STATES, job_state, machine_id, process_lives
from scmdm.system.run_directory import CHECKPOINTS, CONFIG_FILE, LEASE, LOG_FILE, METRICS_FILE, run_of
from scmdm.system.terminal import printable
from scmdm.system.untrusted import describe, require_regular

_TAIL = 2**18  # bytes of the log that are searched for warnings
_SHOWN_WARNINGS = 3
_WARNING = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class CheckpointStatus:
    """The newest intact checkpoint, from which the run would resume."""

    step: int
    path: str
    age_s: float
    verified: str  # "SHA-256" | "sizes"
    damaged: list[str]  # one problem of each newer checkpoint


@dataclass(frozen=True)
class OwnerStatus:
    """The current or last process of the run. None where unknown."""

    host: str | None
    pid: int | None
    user: str | None
    job: str | None
    job_state: str | None  # as squeue prints it; None without a job or without squeue


@dataclass(frozen=True)
class RunStatus:
    """State of a run."""

    run: str
    state: str  # running | silent (no heartbeat, and the owner cannot be looked up) | stopped | finished
    step: int
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None  # of training, without validation and checkpoints; None unless the run is running
    metrics_age_s: float | None  # since the last row
    checkpoint: CheckpointStatus | None
    starts: int
    last_start: StartRecord | None
    owner: OwnerStatus | None
    stacks: list[str]  # files of ranks that the watchdog ended, or that crashed, since the last start
    warnings: list[str]
    damaged: list[str]  # what could not be read of the run's files, and of its checkpoints if none is intact


def read_status(directory: Path, *, hashes: bool = True) -> RunStatus:
    """Read the state of the run in `directory`. Without `hashes`, checkpoints are verified by size only.

    Raises UserError if `directory` is not a run directory.
    """
    run = run_of(directory)
    if run is None:
        raise UserError(f"{directory} is not a run directory: it has no {METRICS_FILE} and no {LOG_FILE}; give one")
    directory, metrics = run, read_metrics(run / METRICS_FILE)
    rows = [row for row in metrics if row["kind"] == "train"]
    row: Mapping[str, Any] = rows[-1] if rows else {}
    starts, (steps, problem) = read_starts(directory), planned_steps(directory)
    last_start = starts.rows[-1] if starts.rows else None
    lease, holder, lease_problem = _lease(directory / LEASE)
    owner = _owner(holder, last_start)
    checkpoint, damaged = _checkpoint(directory / CHECKPOINTS, hashes=hashes)
    step = row.get("step", 0)
    state = "finished" if steps is not None and step >= steps else _state(lease, holder, owner)
    return RunStatus(
        run=str(directory),
        state=state,
        step=step,
        steps=steps,
        loss=row.get("loss"),
        tokens_per_s=row.get("tokens_per_s"),
        eta_s=_eta(row, steps) if state == "running" else None,
        metrics_age_s=_age(directory / METRICS_FILE),
        checkpoint=checkpoint,
        starts=len(starts),
        last_start=last_start,
        owner=owner,
        stacks=[str(path) for path in written_stacks(directory)],
        warnings=_warnings(directory / LOG_FILE)[-_SHOWN_WARNINGS:],
        damaged=[*filter(None, (metrics.problem, starts.problem, problem, lease_problem)), *damaged],
    )


def describe_status(status: RunStatus) -> list[str]:
    """Format the status as lines of text."""
    lines = [f"{status.run}: {status.state}{_owner_text(status)}", f"step         {_progress(status)}"]
    if status.loss is not None and status.tokens_per_s is not None:
        eta = f", left {format_duration(status.eta_s)}" if status.eta_s is not None else ""
        age = f" ({format_duration(status.metrics_age_s)} ago)" if status.metrics_age_s is not None else ""
        lines.append(f"last row     loss {status.loss:.4f}, {status.tokens_per_s:,.0f} tokens/s{eta}{age}")
    lines += [f"checkpoint   {_checkpoint_text(status.checkpoint)}", f"starts       {_starts_text(status)}"]
    lines += [f"stacks       {path}" for path in status.stacks]
    lines += [f"damaged      {text}" for text in status.damaged]
    lines += [f"warning      {text}" for text in status.warnings]
    return [printable(line) for line in lines]  # a file may hold control characters


def _progress(status: RunStatus) -> str:
    if status.steps is None:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.steps:,} ({100 * status.step / status.steps:.1f} %)"


def _owner_text(status: RunStatus) -> str:
    owner = status.owner
    if owner is None:
        return ""
    what = [f"process {owner.pid}" if owner.pid else "", f"of {owner.user}" if owner.user else ""]
    what += [f"on {owner.host}" if owner.host else "", f"job {owner.job}" if owner.job else ""]
    text = " ".join([*filter(None, what), f"({owner.job_state})" if owner.job_state else ""]).strip()
    return f" ({text})" if status.state in ("running", "silent") else f" (last: {text})"


def _checkpoint_text(found: CheckpointStatus | None) -> str:
    if found is None:
        return "none intact yet"
    damaged = f"; newer ones are damaged: {'; '.join(found.damaged)}" if found.damaged else ""
    return f"step {found.step:,}, {format_duration(found.age_s)} old, verified by {found.verified}{damaged}"


def _starts_text(status: RunStatus) -> str:
    last = status.last_start
    if last is None:
        return "none recorded"
    where = ", ".join(last.hosts[:4])
    more = f" and {len(last.hosts) - 4} more" if len(last.hosts) > 4 else ""
    ago = format_duration(max(0.0, time.time() - last.time))
    ranks = f"{last.world_size} process(es) on {where}{more}"
    return f"{status.starts} ({status.starts - 1} restart(s)), the last {ago} ago at step {last.step}: {ranks}"


def planned_steps(directory: Path) -> tuple[int | None, str | None]:
    """Read `train.steps` of the run's last start; None if unknown. Second, what is wrong with the configuration."""
    if not os.path.lexists(directory / CONFIG_FILE):
        return None, None
    try:
        steps = read_stored_config(directory).need("train.steps", int)
        require(steps >= 1, "train.steps", steps, f"at least 1 in {directory / CONFIG_FILE}")
    except UserError as error:
        return None, str(error)
    return steps, None


def _eta(row: Mapping[str, Any], steps: int | None) -> float | None:
    """Estimate the remaining seconds from the last row's speed and the mean number of tokens per step."""
    if steps is None or not row.get("tokens_per_s") or not row.get("step") or "tokens" not in row:
        return None
    seconds = (steps - row["step"]) * (row["tokens"] / row["step"]) / row["tokens_per_s"]
    return seconds if 0 <= seconds < math.inf else None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _checkpoint(directory: Path, *, hashes: bool) -> tuple[CheckpointStatus | None, list[str]]:
    """Return the newest intact checkpoint, and one problem of each checkpoint if none is intact."""
    damaged: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        problems = verify_checkpoint(path, hashes=hashes)
        age = _age(path / SEAL)
        if not problems and age is not None:
            return CheckpointStatus(step_of(path), str(path), age, "SHA-256" if hashes else "sizes", damaged), []
        if os.path.lexists(path):  # the run may have removed it since
            damaged.append(problems[0] if problems else f"{path / SEAL} is gone")
    return None, damaged


def _owner(holder: LeaseHolder | None, last_start: StartRecord | None) -> OwnerStatus | None:
    """Return the lease's last holder, or else the process of the last recorded start."""
    if holder is not None:
        return OwnerStatus(holder.host, holder.pid, holder.user, holder.job, _job_state(holder.job))
    if last_start is None:
        return None
    job = last_start.slurm_job_id
    return OwnerStatus(last_start.host, last_start.pid, None, job, _job_state(job))


def _lease(directory: Path) -> tuple[Path | None, LeaseHolder | None, str | None]:
    """Return the newest lease, its holder, and why the leases cannot be read."""
    try:
        return *read_lease(directory), None
    except OSError as error:
        return None, None, f"{directory} cannot be read ({describe(error)}); it is left out"


def _job_state(job: str | None) -> str | None:
    return job_state(job) if job else None


def _state(lease: Path | None, holder: LeaseHolder | None, owner: OwnerStatus | None) -> str:
    """Determine the state of an unfinished run."""
    if lease is None or (holder is not None and holder.released):
        return "stopped"
    if holder is not None and holder.machine == machine_id():
        return "running" if process_lives(holder.pid, holder.pid_start) else "stopped"
    if owner is not None and owner.job_state is not None:
        return "running" if owner.job_state in LIVE_JOB_STATES else "stopped"
    # The local clock suffices for display; reading the file server's clock would require a write.
    age = _age(lease)
    return "running" if age is not None and age < SILENCE_LIMIT_S else "silent"


def _warnings(path: Path) -> list[str]:
    """Read the warnings and errors near the end of the log."""
    try:
        size = require_regular(path).st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL))
            lines = file.read(2 * _TAIL).decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if _WARNING.match(line)]
