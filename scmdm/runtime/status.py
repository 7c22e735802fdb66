"""`scmdm status`: how a run stands, read from its directory alone, whoever runs it and wherever.

Everything it reads may be half-written, missing or of an older scmdm; nothing it does disturbs the run.
"""

from __future__ import annotations

import fcntl
import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scmdm.checkpoint.checkpoint import SEAL, list_checkpoints, step_of, verify_checkpoint
from scmdm.errors import UserError
from scmdm.observability.metrics import LOG_FILE, METRICS_FILE, format_duration, read_metrics
from scmdm.runtime.start_log import read_starts
from scmdm.runtime.watchdog import written_stacks
from scmdm.system.liveness import JOB_LIVES, job_state, process_lives

_OWNER, _LOCK = ".owner.json", ".lock"
_SILENT_S = 300.0  # the owner gives a sign of life far more often
_TAIL = 2**18
_WARNING = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class Checkpoint:
    """The newest one from which the run would go on."""

    step: int
    path: str
    age_s: float
    verified: str  # "SHA-256" | "sizes"
    damaged: list[str]  # newer ones that do not verify


@dataclass(frozen=True)
class Owner:
    """Who runs it, or ran it last; what is not known is None."""

    host: str | None
    pid: int | None
    user: str | None
    job: str | None
    job_state: str | None  # as squeue says; None without a job or without squeue


@dataclass(frozen=True)
class Status:
    run: str
    state: str  # running | silent (its owner cannot be asked, and gives no sign) | stopped | finished
    step: int
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None  # training alone; None unless it runs
    metrics_age_s: float | None  # since a row was written
    checkpoint: Checkpoint | None
    starts: int
    last_start: dict[str, Any] | None
    owner: Owner | None
    stacks: list[str]  # of ranks that the watchdog ended, or that crashed, since the last start
    warnings: list[str]


def read_status(directory: Path, *, hashes: bool = True, warnings: int = 3) -> Status:
    """How the run in `directory` stands; UserError when there is none. Without `hashes` only sizes are checked."""
    if not (directory / LOG_FILE).exists() and not (directory / METRICS_FILE).exists():
        raise UserError(f"{directory} is no run (neither {METRICS_FILE} nor {LOG_FILE}); give a run directory")
    rows = [row for row in read_metrics(directory / METRICS_FILE) if row.get("kind") == "train"]
    row: Mapping[str, Any] = rows[-1] if rows else {}
    starts, steps = read_starts(directory), planned_steps(directory)
    owner = _owner(directory, starts[-1] if starts else None)
    step = int(row.get("step", 0))
    state = "finished" if steps is not None and step >= steps else _state(directory, owner)
    return Status(
        run=str(directory),
        state=state,
        step=step,
        steps=steps,
        loss=row.get("loss"),
        tokens_per_s=row.get("tokens_per_s"),
        eta_s=_eta(row, steps) if state == "running" else None,
        metrics_age_s=_age(directory / METRICS_FILE),
        checkpoint=_checkpoint(directory / "checkpoints", hashes=hashes),
        starts=len(starts),
        last_start=starts[-1] if starts else None,
        owner=owner,
        stacks=[str(path) for path in written_stacks(directory)],
        warnings=_warnings(directory / LOG_FILE)[-warnings:],
    )


def describe_status(status: Status) -> list[str]:
    """A few lines for a person."""
    lines = [f"{status.run}: {status.state}{_owner_text(status)}", f"step         {_progress(status)}"]
    if status.loss is not None and status.tokens_per_s is not None:
        eta = f", left {format_duration(status.eta_s)}" if status.eta_s is not None else ""
        age = f" ({format_duration(status.metrics_age_s)} ago)" if status.metrics_age_s is not None else ""
        lines.append(f"last row     loss {status.loss:.4f}, {status.tokens_per_s:,.0f} tokens/s{eta}{age}")
    lines += [f"checkpoint   {_checkpoint_text(status.checkpoint)}", f"starts       {_starts_text(status)}"]
    lines += [f"stacks       {path}" for path in status.stacks]
    return lines + [f"warning      {text}" for text in status.warnings]


def _progress(status: Status) -> str:
    if status.steps is None:
        return f"{status.step:,}"
    return f"{status.step:,} of {status.steps:,} ({100 * status.step / status.steps:.1f} %)"


def _owner_text(status: Status) -> str:
    owner = status.owner
    if owner is None:
        return ""
    what = [f"process {owner.pid}" if owner.pid else "", f"of {owner.user}" if owner.user else ""]
    what += [f"on {owner.host}" if owner.host else "", f"job {owner.job}" if owner.job else ""]
    text = " ".join([*filter(None, what), f"({owner.job_state})" if owner.job_state else ""]).strip()
    return f" ({text})" if status.state in ("running", "silent") else f" (last: {text})"


def _checkpoint_text(found: Checkpoint | None) -> str:
    if found is None:
        return "none yet that is whole"
    damaged = f"; newer ones are damaged: {'; '.join(found.damaged)}" if found.damaged else ""
    return f"step {found.step:,}, {format_duration(found.age_s)} old, whole by its {found.verified}{damaged}"


def _starts_text(status: Status) -> str:
    last = status.last_start
    if last is None:
        return "none recorded"
    where = ", ".join(str(host) for host in last.get("hosts", [])[:4])
    more = f" and {len(last['hosts']) - 4} more" if len(last.get("hosts", [])) > 4 else ""
    ago = format_duration(max(0.0, time.time() - last.get("time", time.time())))
    ranks = f"{last.get('world_size')} process(es) on {where}{more}"
    return f"{status.starts} ({status.starts - 1} restart(s)), the last {ago} ago at step {last.get('step')}: {ranks}"


def planned_steps(directory: Path) -> int | None:
    """`train.steps` of a run as it was started last."""
    try:
        return int(yaml.safe_load((directory / "config.yaml").read_text())["train"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _eta(row: Mapping[str, Any], steps: int | None) -> float | None:
    """From the last row's speed and the mean number of tokens of a step."""
    if steps is None or not row.get("tokens_per_s") or not row.get("step") or "tokens" not in row:
        return None
    return float((steps - row["step"]) * row["tokens"] / row["step"] / row["tokens_per_s"])


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _checkpoint(directory: Path, *, hashes: bool) -> Checkpoint | None:
    damaged: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        problems = verify_checkpoint(path, hashes=hashes)
        age = _age(path / SEAL)
        if not problems and age is not None:
            return Checkpoint(step_of(path), str(path), age, "SHA-256" if hashes else "sizes", damaged)
        if path.exists():  # the run removes old ones while this looks
            damaged.append(problems[0])
    return None


def _owner(directory: Path, last_start: Mapping[str, Any] | None) -> Owner | None:
    """Who signed the directory, else who started last."""
    try:
        found = json.loads((directory / _OWNER).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        found = last_start
    if found is None:
        return None
    job = found.get("job") or found.get("slurm_job_id")
    state = job_state(str(job)) if job else None
    return Owner(found.get("host"), found.get("pid"), found.get("user"), job, state)


def _state(directory: Path, owner: Owner | None) -> str:
    """Whether a run that is not done goes on."""
    here = owner is None or owner.host is None or owner.host == socket.gethostname()
    if here:
        alive = owner is None or owner.pid is None or process_lives(owner.pid)
        return "running" if alive and _locked(directory / _LOCK) else "stopped"
    if owner is not None and owner.job_state is not None:
        return "running" if owner.job_state in JOB_LIVES else "stopped"
    signature = _age(directory / _OWNER)
    if signature is None:  # it is removed at the end
        return "running" if _locked(directory / _LOCK) else "stopped"
    return "running" if signature < _SILENT_S else "silent"


def _locked(path: Path) -> bool:
    """Whether a process holds the run's lock. To ask, a shared lock is tried for a moment."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # no locks on this file system: the owner's word must do
        return True
    return False


def _warnings(path: Path) -> list[str]:
    """The log's lines of that kind; only its end is read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if _WARNING.match(line)]
