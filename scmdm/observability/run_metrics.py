"""Outputs of a run's metrics and messages: `metrics.jsonl`, `train.log`, wandb."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

from rich.logging import RichHandler

from scmdm.config.training import WandbConfig
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text
from scmdm.system.run_directory import LOG_FILE
from scmdm.system.signals import stop_signals_blocked
from scmdm.system.terminal import Terminal, printable

_TAIL = 8192  # bytes at the end of a file, which hold several rows
logger = logging.getLogger("scmdm")


class MetricsFile:
    """Append-only file of JSON lines.

    Opening it at `resume_step` drops the rows of later steps, so that every step appears once however often the run was
    interrupted. Without a path, on ranks other than 0, nothing is written.
    """

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
    """Return the rows of a metrics file, without lines that a crash has cut short."""
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
    """Return the last row of a kind in a metrics file, which may be growing. Reads only the end of the file."""
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
    """Start a wandb run, or continue `run_id`; returns None if wandb is disabled. Offline mode needs no account."""
    if config.mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"wandb.mode={config.mode}, but wandb is not installed; run `pip install wandb`, or set wandb.mode=disabled"
        ) from error
    try:
        with stop_signals_blocked():  # SIGUSR1 would end wandb's service, which unblocks SIGTERM itself
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
        raise UserError(
            f"wandb.mode={config.mode} failed: {reason}; run `wandb login`, or set wandb.mode=offline"
        ) from error


class _LiteralFormatter(logging.Formatter):
    """Shows control characters, which names and texts of others may contain, as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep_lines=True)


@contextmanager
def log_to(run_dir: Path, *, write: bool = True) -> Iterator[Terminal]:
    """Send messages of the `scmdm` logger to `train.log` and to the terminal or standard output.

    Yields the console. Without `write`, on ranks other than 0, nothing is logged or shown.
    """
    console = Terminal(quiet=not write)
    if not write:
        yield console
        return
    plain = _LiteralFormatter("%(asctime)s %(levelname)s %(message)s")
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / LOG_FILE)]
    if console.is_terminal:
        handlers.append(RichHandler(console=console, show_path=False, markup=False))
    else:
        handlers.append(logging.StreamHandler(sys.stdout))
    for handler in handlers:
        handler.setFormatter(_LiteralFormatter() if isinstance(handler, RichHandler) else plain)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield console
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def format_duration(seconds: float) -> str:
    """Format seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
