"""Progress display of a study, read from the metrics files of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scmdm.observability.progress_bar import PLAIN_LINES
from scmdm.observability.run_metrics import last_row
from scmdm.system.run_directory import METRICS_FILE
from scmdm.system.terminal import Terminal


class StudyDisplay:
    """A progress bar per run on a terminal, otherwise a few plain lines per run.

    `runs` lists each run's name, directory and number of steps.
    """

    def __init__(self, console: Terminal, runs: list[tuple[str, Path, int]]) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._runs = [(*run, self._bars.add_task(run[0], total=run[2], numbers="")) for run in runs]
        self._lines = {name: _lines_due(last_row(run / METRICS_FILE, "train"), steps) for name, run, steps in runs}

    def __enter__(self) -> StudyDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def print(self, line: str) -> None:
        """Print a line above the bars."""
        self._console.print(line, soft_wrap=True)

    def update(self) -> None:
        """Read the progress of all runs and display it."""
        for name, directory, steps, bar in self._runs:
            row = last_row(directory / METRICS_FILE, "train")
            if row is None:
                continue
            numbers = f"loss {row['loss']:.4f}  {row.get('tokens_per_s') or 0:,.0f} tokens/s"
            self._bars.update(bar, completed=row["step"], numbers=numbers)
            if not self._console.is_terminal and _lines_due(row, steps) > self._lines[name]:
                self._lines[name] = _lines_due(row, steps)
                self.print(f"{name}: step {row['step']}/{steps}  {numbers}")


def _lines_due(row: dict[str, Any] | None, steps: int) -> int:
    """Number of plain progress lines due at the step of `row`."""
    return int(row["step"] * PLAIN_LINES // steps) if row is not None else 0
