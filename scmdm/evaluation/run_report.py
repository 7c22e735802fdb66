"""`scmdm report` of a run: a self-contained HTML file, and its figures as PNG files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scmdm.errors import UserError
from scmdm.evaluation.html import heading, page, paragraph, picture, preformatted, table
from scmdm.evaluation.report_figures import loss_figure, progress_figure
from scmdm.evaluation.statistics import mean_interval
from scmdm.observability.run_metrics import format_duration, read_metrics
from scmdm.runtime.status import planned_steps
from scmdm.system.files import atomic_write_text

_SHOWN_FILES = ("config.yaml", "environment.json")


def run_report(directory: Path, out: Path) -> Path:
    """Write the report of a run, finished or not: loss curves, evaluations, configuration. Returns `out`.

    Raises UserError if the run has not logged a training step, or if an evaluation cannot be read.
    """
    rows = read_metrics(directory / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    if not train:
        raise UserError(
            f"{directory}/metrics.jsonl has no training step; wait until the run has made train.log_every steps"
        )
    name = directory.resolve().name
    last = train[-1]
    figures = out.parent
    losses = loss_figure({name: train}, {name: validation}, figures / "losses.png", order=[name])
    progress = progress_figure(train, figures / "progress.png")
    parts = [
        paragraph(
            f"Step {last['step']:,}{_of_steps(directory)}, {last['tokens']:,} tokens, "
            f"{format_duration(last['seconds'])} of training, loss {last['loss']:.4f}."
        ),
        picture(losses, "Training loss and validation NELBO."),
        picture(progress, "Learning rate, gradient norm and speed."),
        *_run_evaluations(directory),
        heading("Configuration"),
        *(preformatted((directory / name).read_text()) for name in _SHOWN_FILES if (directory / name).exists()),
    ]
    atomic_write_text(out, page(f"Run {name}", parts))
    return out


def _of_steps(directory: Path) -> str:
    """The planned number of steps as ` of N`; empty if it is not known."""
    steps = planned_steps(directory)
    return f" of {steps:,}" if steps is not None else ""


def _run_evaluations(directory: Path) -> list[str]:
    parts = []
    for path in sorted((directory / "evaluations").glob("*.json")):
        result = _read_result(path)
        rows = [
            [f"NELBO {mode}", f"{v['mean']:.4f} ± {v['stderr']:.4f}"] for mode, v in result.get("nelbo", {}).items()
        ]
        numbers = [entry["metrics"] for entry in result.get("samples", [])]
        names = [key for key in (numbers[0] if numbers else {}) if isinstance(numbers[0][key], int | float)]
        whole = [key for key in names if all(isinstance(n[key], int | float) for n in numbers)]
        rows += [[key.replace("_", " "), mean_interval([n[key] for n in numbers]).text(4)] for key in whole]
        parts += [heading(f"Evaluation {path.stem} (step {result['step']:,})"), table(["metric", "value"], rows)]
    return parts


def _read_result(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, or run `scmdm evaluate` again") from error
