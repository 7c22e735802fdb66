"""Tables of a study as text, computed from the rows of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scmdm.domains.interface import Metric
from scmdm.evaluation.comparison import Json, Quality, QualityByArm, QualityByMetric
from scmdm.observability.run_metrics import format_duration

TextTable = tuple[list[str], list[list[str]]]  # header and rows


def quality_table(
    values: QualityByMetric,
    shown: Sequence[Metric],
    labels: Mapping[str, str],
    samples: Sequence[Json],
) -> TextTable:
    """Return header and rows of the main table: a row for each T and arm, a column for each metric."""
    header = ["T", "model", "evaluations (computed)", "samples", *(metric.title for metric in shown)]
    rows = []
    for steps in sorted({row["steps"] for row in samples}):
        for arm, label in labels.items():
            own = [row for row in samples if row["arm"] == arm and row["steps"] == steps]
            if not own:
                continue
            cells = [_cell(values[metric.name].get(label, {}).get(steps), metric) for metric in shown]
            drawn = f"{len(own)} x {own[0]['num']}"
            rows.append([str(steps), label, evaluations_text(own), drawn, *cells])
    return header, rows


def evaluations_text(rows: Sequence[Json]) -> str:
    """Return the evaluations per sample, and in brackets those that were not skipped, where the rows have them."""
    computed = [row.get("computed_evaluations") for row in rows]
    known = [value for value in computed if isinstance(value, int | float)]
    text = str(rows[0]["evaluations"])
    return f"{text} ({np.mean(known):.1f})" if known and len(known) == len(computed) else text


def _cell(quality: Quality | None, metric: Metric) -> str:
    return "-" if quality is None else quality.estimate.text(metric.digits, metric.scale)


def benchmark_table(
    values: QualityByMetric,
    shown: Sequence[Metric],
    labels: Mapping[str, str],
    samples: Sequence[Json],
) -> TextTable:
    """Return header and rows of a benchmark's table: a row for each T and metric, a column for each arm."""
    header = ["T", "metric", "real data", *labels.values()]
    rows = []
    for steps in sorted({row["steps"] for row in samples}):
        for metric in shown:
            cells = [_cell(values[metric.name].get(label, {}).get(steps), metric) for label in labels.values()]
            rows.append([str(steps), metric.title, metric.reference_text() or "-", *cells])
    return header, rows


def trainings_table(values: QualityByArm, metric: Metric) -> TextTable:
    """Return header and rows of the table of each training's value: a row for each T and arm with several trainings."""
    header = ["T", "model", f"{metric.title}: each training", "range"]
    rows = []
    for steps in sorted({steps for by_steps in values.values() for steps in by_steps}):
        for label, by_steps in values.items():
            trainings = by_steps[steps].trainings.values if steps in by_steps else ()
            if len(trainings) > 1:
                shown = [f"{metric.scale * value:.{metric.digits}f}" for value in trainings]
                spread = f"{metric.scale * (max(trainings) - min(trainings)):.{metric.digits}f}"
                rows.append([str(steps), label, ", ".join(shown), spread])
    return header, rows


def cost_table(arms: Sequence[Json], samples: Sequence[Json]) -> TextTable:
    """Return header and rows of the cost table: training and sampling of each arm, and its NELBO."""
    header = [
        "model",
        "tokens trained on",
        "denoiser evaluations per sequence",
        "training time",
        "time per token / vanilla (concurrent jobs)",
        "sampling, ms per sample and computed evaluation",
        "NELBO null",
        "NELBO conditioned",
    ]
    vanilla = next((_seconds_per_token(a) for a in arms if a["rate"] == 0 and a["cost"] and a["name"] != "base"), None)
    rows = []
    for arm in arms:
        own = [row for row in samples if row["arm"] == arm["name"]]
        speed = f"{np.mean([_ms_per_evaluation(row) for row in own]):.3f}"
        rows.append(
            [arm["label"], *_training_cost(arm, vanilla), speed, *(_nelbo(arm, m) for m in ("null", "conditioned"))]
        )
    return header, rows


def _ms_per_evaluation(row: Json) -> float:
    """Milliseconds per sample and computed evaluation; earlier versions stored the number of steps alone."""
    computed = row.get("computed_evaluations")
    known = isinstance(computed, int | float) and computed > 0
    return 1e3 * row["seconds"] / row["num"] / (computed if known else row["evaluations"])


def _training_cost(arm: Json, vanilla: float | None) -> list[str]:
    if not arm["cost"]:
        return ["(given)" if arm.get("samples_of") is None else f"(samples of {arm['samples_of']})", "-", "-", "-"]
    first = arm["cost"][0]
    relative = f"{_seconds_per_token(arm) / vanilla:.2f}" if vanilla and arm["name"] != "base" else "-"
    return [
        f"{first['tokens']:,}",
        f"{first['evaluations'] / first['sequences']:.0f}",
        format_duration(first["seconds"]),
        relative,
    ]


def _seconds_per_token(arm: Json) -> float:
    return sum(cost["seconds"] for cost in arm["cost"]) / sum(cost["tokens"] for cost in arm["cost"])


def _nelbo(arm: Json, mode: str) -> str:
    """Mean over trainings, and its standard error over held-out sequences, which are those of all models."""
    entries = [entry[mode] for entry in arm["nelbo"] if mode in entry]
    known = [entry["mean"] for entry in entries if entry["mean"] is not None]
    errors = [entry.get("stderr") for entry in entries]
    error = f" ± {np.mean(errors):.4f}" if errors and None not in errors else ""
    return f"{np.mean(known):.4f}{error}" if known else "-"
