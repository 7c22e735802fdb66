"""Outputs of a run's metrics and messages: `metrics.jsonl`, `train.log`, wandb."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from rich.logging import RichHandler

from scmdm.config.training import WandbConfig
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text, json_text, remove_tree
from scmdm.system.json_lines import JsonLines, read_json_lines
from scmdm.system.lease import Fence
from scmdm.system.line_file import LineFile
from scmdm.system.run_directory import LOG_FILE
from scmdm.system.signals import stop_signals_blocked
from scmdm.system.terminal import Terminal, printable
from scmdm.system.untrusted import describe, parse_json, require_regular

_TAIL = 8192  # bytes at the end of a file, which hold several rows
# Numbers that a row must have, by its kind.
_NUMBERS_OF = {"train": ("loss", "tokens"), "validation": ("tokens",)}
_TEXTS = ("kind", "weights")
_LARGEST_NUMBER = 2.0**63
logger = logging.getLogger("scmdm")


class MetricsFile:
    """Append-only file of JSON lines.

    Opening it at `resume_step` drops the rows of later steps, so that every step appears once however often the run was
    interrupted. Damaged lines are dropped, too; the file as it was is then kept as `metrics.jsonl.damaged`. Without a
    path, on ranks other than 0, nothing is written.

    With `keep_going`, rows that cannot be written wait until there is room; otherwise `write` raises UserError.
    """

    def __init__(
        self, path: Path | None, resume_step: int, *, keep_going: bool = False, fence: Fence | None = None
    ) -> None:
        self._file = LineFile(path, fence) if path is not None else None
        self._keep_going = keep_going
        self._failing = False
        if path is not None:
            if fence is not None:
                fence.require()
            _truncate(path, resume_step)

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._report(self._file.write(json_text(row)))

    def close(self) -> None:
        if self._file is not None and self._file.close() is not None:
            logger.warning("%d row(s) of %s could not be written and are lost", self._file.lost, self._file.path)

    def _report(self, error: OSError | None) -> None:
        """Say once that the file cannot be written, and once that it can be written again."""
        assert self._file is not None
        if error is not None and not self._keep_going:
            raise UserError(
                f"cannot write {self._file.path}: {describe(error)}; free space or choose another place, or set "
                "train.on_save_error=continue"
            ) from error
        if error is not None and not self._failing:
            logger.warning(
                "cannot write %s: %s; continuing, its rows wait until there is room", self._file.path, describe(error)
            )
        if error is None and self._failing:
            lost = f", but {self._file.lost} row(s) are lost" if self._file.lost else ""
            logger.warning("%s is written again%s", self._file.path, lost)
        self._failing = error is not None


def _truncate(path: Path, resume_step: int) -> None:
    found = read_metrics(path)
    if found.problem is not None:
        logger.warning("%s", found.problem)
        kept_as = path.with_name(f"{path.name}.damaged")
        with contextlib.suppress(OSError):
            remove_tree(kept_as)
            os.rename(path, kept_as)
            logger.warning("%s is kept as %s", path, kept_as)
    kept = [row for row in found if row["step"] <= resume_step] if resume_step else []
    atomic_write_text(path, "".join(json_text(row) for row in kept))


def read_metrics(path: Path) -> JsonLines[dict[str, Any]]:
    """Read the rows of a metrics file, which may be growing. Lines that are not rows are counted."""
    return read_json_lines(path, parse_row)


def parse_row(line: bytes) -> dict[str, Any]:
    """Parse a row of a training step or a validation. Raises ValueError and others for anything else."""
    row = parse_json(line, nan_is_null=True)  # earlier versions wrote NaN
    if not isinstance(row, dict) or row.get("kind") not in _NUMBERS_OF:
        raise ValueError("not a row of metrics")
    if type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError("no step")
    numbers = {name: value for name, value in row.items() if name not in _TEXTS}
    for name, value in numbers.items():
        if value is not None and (type(value) not in (int, float) or abs(value) >= _LARGEST_NUMBER):
            raise ValueError(f"{name} is not a number that a run writes")
    missing = [name for name in _NUMBERS_OF[row["kind"]] if numbers.get(name) is None]
    if missing:
        raise ValueError(f"no {missing[0]}")
    return row


def last_row(path: Path, kind: str) -> dict[str, Any] | None:
    """Return the last row of a kind in a metrics file, which may be growing. Reads only the end of the file."""
    try:
        size = require_regular(path).st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL))
            lines = file.read(2 * _TAIL).split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(Exception):
            row = parse_row(line)
            if row["kind"] == kind:
                return row
    return None


Tracker: TypeAlias = Any  # a wandb run


def start_wandb(config: WandbConfig, run_dir: Path, run_config: dict[str, Any], run_id: str | None) -> Tracker | None:
    """Start a wandb run, or continue `run_id`; returns None if wandb is disabled. Offline mode needs no account."""
    if config.mode == "disabled":
        return None
    import wandb  # slow to import, and few runs use it

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


class LogFile(logging.Handler):
    """Handler of `train.log`: lines wait while they cannot be written. A log never ends a run."""

    def __init__(self, path: Path, fence: Fence | None = None) -> None:
        super().__init__()
        self._file = LineFile(path, fence)
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        error = self._file.write(self.format(record))
        if (error is not None) == self._failing:
            return
        self._failing = error is not None
        if error is not None:
            logger.warning("cannot write %s: %s; its lines wait until there is room", self._file.path, describe(error))
        elif self._file.lost:
            logger.warning("%s is written again, but %d line(s) are lost", self._file.path, self._file.lost)

    def close(self) -> None:
        if self._file.close() is not None:
            logger.warning("%d line(s) of %s could not be written and are lost", self._file.lost, self._file.path)
        super().close()


class PatientStream(logging.StreamHandler[TextIO]):
    """Handler of standard output, which may be a file on a full disk; what cannot be shown there does not end a run."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        try:
            self.flush()
        except OSError:
            # Python would write the rest on exit, fail, and change the exit status.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.stream.fileno())
        super().close()


class _LiteralFormatter(logging.Formatter):
    """Shows control characters, which names and texts of others may contain, as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep_lines=True)


@contextmanager
def log_to(run_dir: Path, *, write: bool = True, fence: Fence | None = None) -> Iterator[Terminal]:
    """Send messages of the `scmdm` logger to `train.log` and to the terminal or standard output.

    Yields the console. Without `write`, on ranks other than 0, only warnings are shown, on standard error: what all
    ranks know is for rank 0 to log. With the run's `fence`, nothing is written to `train.log` once another process has
    taken the run over.
    """
    console = Terminal(quiet=not write)
    if not write:
        yield console
        return
    plain = _LiteralFormatter("%(asctime)s %(levelname)s %(message)s")
    handlers: list[logging.Handler] = [LogFile(run_dir / LOG_FILE, fence)]
    if console.is_terminal:
        handlers.append(RichHandler(console=console, show_path=False, markup=False))
    else:
        handlers.append(PatientStream(sys.stdout))
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
