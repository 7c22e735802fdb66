"""`scmdm report` of a run: a self-contained HTML file, and its figures as PNG files beside it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from scmdm.errors import UserError
from scmdm.evaluation.html import bullets, heading, page, paragraph, picture, preformatted, table
from scmdm.evaluation.report_figures import loss_figure, progress_figure
from scmdm.evaluation.result_table import sample_estimate
from scmdm.observability.run_metrics import format_duration, read_metrics
from scmdm.runtime.status import planned_steps
from scmdm.system.files import atomic_write_text
from scmdm.system.run_directory import CONFIG_FILE, ENVIRONMENT_FILE, EVALUATIONS, METRICS_FILE
from scmdm.system.untrusted import parse_json, read_bytes, reading

_SHOWN_FILES = (CONFIG_FILE, ENVIRONMENT_FILE)
_LARGEST_SHOWN = 2**20  # bytes
logger = logging.getLogger("scmdm")


def run_report(directory: Path, out: Path) -> Path:
    """Write the report of a run, finished or not: loss curves, evaluations, configuration. Returns `out`.

    What cannot be read is left out, and named in the report and in warnings. Raises UserError if there is no training
    step.
    """
    rows = read_metrics(directory / METRICS_FILE)
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    if not train:
        reason = f" ({rows.problem})" if rows.problem is not None else ""
        raise UserError(f"{rows.path} has no training step{reason}; wait until the run has made train.log_every steps")
    name = Path(os.path.realpath(directory)).name
    last = train[-1]
    figures = out.parent
    label = f"run {name}"  # matplotlib leaves labels that begin with _ out of legends
    losses = loss_figure({label: train}, {label: validation}, figures / "losses.png", order=[label])
    progress = progress_figure(train, figures / "progress.png")
    steps, problem = planned_steps(directory)
    evaluations, damaged = _run_evaluations(directory)
    problems = [text for text in (rows.problem, problem, *damaged) if text is not None]
    for text in problems:
        logger.warning("%s", text)
    parts = [
        paragraph(
            f"Step {last['step']:,}{f' of {steps:,}' if steps is not None else ''}, {last['tokens']:,} tokens, "
            f"{format_duration(last.get('seconds') or 0)} of training, loss {last['loss']:.4f}."
        ),
        bullets(problems) if problems else "",
        picture(losses, "Training loss and validation NELBO."),
        picture(progress, "Learning rate, gradient norm and speed."),
        *evaluations,
        heading("Configuration"),
        *(preformatted(_shown(directory / name)) for name in _SHOWN_FILES if (directory / name).exists()),
    ]
    atomic_write_text(out, page(f"Run {name}", parts))
    return out


def _run_evaluations(directory: Path) -> tuple[list[str], list[str]]:
    """The parts of the page about evaluations, and the problems of those that cannot be read."""
    parts, problems = [], []
    for path in sorted((directory / EVALUATIONS).glob("*.json")):
        try:
            with reading(path, "result of an evaluation"):
                parts += _evaluation(path.stem, parse_json(read_bytes(path), nan_is_null=True))
        except (UserError, OSError) as error:
            problems.append(f"left out: {error}")
    return parts, problems


def _evaluation(name: str, result: dict[str, Any]) -> list[str]:
    rows = [[f"NELBO {mode}", _value(v["mean"], v["stderr"])] for mode, v in result.get("nelbo", {}).items()]
    rows += [
        [f"zero-shot perplexity, {text}, {mode}", _value(found["perplexity"], None)]
        for text, modes in result.get("zero_shot", {}).items()
        for mode, found in modes.items()
    ]
    numbers = [entry["metrics"] for entry in result.get("samples", [])]
    names = [key for key in (numbers[0] if numbers else {}) if isinstance(numbers[0][key], int | float)]
    whole = [key for key in names if all(isinstance(n[key], int | float) for n in numbers)]
    rows += [[key.replace("_", " "), sample_estimate(result, key).text(4)] for key in whole]
    return [heading(f"Evaluation {name} (step {result['step']:,})"), table(["metric", "value"], rows)]


def _value(mean: float | None, stderr: float | None) -> str:
    return "unknown" if mean is None else f"{mean:.4f}" if stderr is None else f"{mean:.4f} ± {stderr:.4f}"


def _shown(path: Path) -> str:
    """The text of a file, as far as it can be shown."""
    try:
        return read_bytes(path, _LARGEST_SHOWN).decode(errors="replace")
    except (UserError, OSError) as error:
        return f"{path.name} cannot be shown: {error}"
