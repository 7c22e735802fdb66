"""Layout of a run directory: the names of its files and folders."""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.yaml"  # the resolved configuration of the last start
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
STARTS_FILE = "starts.jsonl"
CHECKPOINTS = "checkpoints"
LATEST_FILE = "latest"  # in CHECKPOINTS: the name of the newest one
EVALUATIONS = "evaluations"
STACKS = "stacks"  # stack traces that the watchdog or a crash left
PROFILE = "profile"
LAUNCH = "launch"
LEASE = ".lease"


def run_of(path: Path) -> Path | None:
    """Return the run that `path` is, or belongs to as its folder of checkpoints, a checkpoint or `latest`; or None."""
    whole = path.absolute()
    candidates = [path]
    if whole.name == CHECKPOINTS:
        candidates.append(whole.parent)
    if whole.parent.name == CHECKPOINTS:
        candidates.append(whole.parents[1])
    marks = (METRICS_FILE, LOG_FILE)
    return next((place for place in candidates if any((place / name).exists() for name in marks)), None)
