"""Layout of a run directory: the names of its files and folders."""

from __future__ import annotations

from pathlib import Path

from scmdm.errors import UserError

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
_RUN_FILES = frozenset({CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, STARTS_FILE})
# Files by which commands recognise models, data sets and studies.
_OTHER_FILES = frozenset(
    {"checkpoint.json", "config.json", "generation_config.json", "index.json", "manifest.json", "model.json"}
    | {"remote.json", "scorer.json", "state.json", "study.json", "tokenizer.json", "tokenizer_config.json"}
)
RESERVED_FILES = _RUN_FILES | _OTHER_FILES  # no report and no samples may replace them


def require_place_of_run(directory: Path) -> None:
    """Raise UserError if a directory holds a model, a data set or a study, in which no run belongs."""
    for name in sorted(_OTHER_FILES):
        if (directory / name).exists():
            raise UserError(f"run_dir={directory} already holds {name}, which is not of a run; give another directory")


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
