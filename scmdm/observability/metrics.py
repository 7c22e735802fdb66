"""Where a run's numbers go: `metrics.jsonl`, wandb (on request), a progress bar or plain lines, `train.log`."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scmdm.config.training import WandbConfig
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text
from scmdm.system.signals import signals_held

METRICS_FILE, LOG_FILE = "metrics.jsonl", "train.log"
_TAIL = 8192  # bytes: several rows
logger = logging.getLogger("scmdm")


class MetricsFile:
    """Append-only JSON lines. Opening it for a resume drops what lies beyond the checkpoint's step, so that a step
    appears once however often the run was interrupted. Without a path (the ranks that do not write) nothing is kept."""

    def __init__(self, path: Path | None, resume_step: int) -> None:
        self._file: IO[str] | None = None
        if path is None:
            return
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step else []
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def last_row(path: Path, kind: str) -> dict[str, Any] | None:
    """The last whole row of a kind near the end of a metrics file, which may be growing, without reading the rest."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):
            row: dict[str, Any] = json.loads(line)
            if row["kind"] == kind:
                return row
    return None


Tracker: TypeAlias = Any  # a wandb run; wandb is optional


def start_wandb(config: WandbConfig, run_dir: Path, run_config: dict[str, Any], run_id: str | None) -> Tracker | None:
    """Start, or with `run_id` continue, a wandb run; None when disabled. Offline needs no account."""
    if config.mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb.mode is set but wandb is not installed; `pip install wandb` or wandb.mode=disabled"
        ) from error
    try:
        with signals_held():  # its service would not survive USR1; SIGTERM it unblocks
            return wandb.init(
                project=config.project,
                name=config.name or run_dir.name,
                dir=run_dir,
                mode="offline" if config.mode == "offline" else "online",
                id=run_id,
                resume="allow" if run_id else None,
                config=run_config,
            )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"wandb.mode={config.mode} failed: {reason}; `wandb login`, or wandb.mode=offline") from error


@contextmanager
def log_to(run_dir: Path, *, write: bool = True) -> Iterator[Console]:
    """Send the `scmdm` logger to `train.log`, plain, and to the terminal or, without one, to standard output.

    Without `write` (the ranks that do not log) nothing is shown.
    """
    console = Console(quiet=not write)
    if not write:
        yield console
        return
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / LOG_FILE)]
    if console.is_terminal:
        handlers.append(RichHandler(console=console, show_path=False, markup=False))
    else:
        handlers.append(logging.StreamHandler(sys.stdout))
    for handler in handlers:
        if not isinstance(handler, RichHandler):
            handler.setFormatter(plain)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield console
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class StepDisplay:
    """A bar with loss, tokens/s and time left on a terminal; without one the log lines alone speak."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]}  left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        hidden = console.quiet or not console.is_terminal
        self._progress = Progress(*columns, console=console, disable=hidden)
        self._task = self._progress.add_task("train", total=steps, completed=done, loss="-", rate="-")

    def __enter__(self) -> StepDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, loss: float, tokens_per_s: float) -> None:
        self._progress.update(self._task, advance=1, loss=f"{loss:.4f}", rate=f"{tokens_per_s:,.0f} tokens/s")


def format_duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
