"""The table of an evaluation's results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from scmdm.domains.interface import Metric
from scmdm.evaluation.significance import Estimate
from scmdm.evaluation.study_tables import evaluations_text
from scmdm.system.terminal import Terminal


def print_result(result: Mapping[str, Any], metrics: Sequence[Metric]) -> None:
    """Print the JSON object that `run_evaluation` writes; `metrics` are its domain's."""
    table = Table(title=f"{result['model']} at step {result['step']:,}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    rows = result.get("samples", [])
    shown = [m for m in metrics if rows and None not in [row["metrics"].get(m.name) for row in rows]]
    with_reference = any(metric.reference_text() for metric in shown)
    if with_reference:
        table.add_column("real data", justify="right")
    _add_likelihoods(table, result)
    if rows:
        for metric in shown:
            found = sample_estimate(result, metric.name)
            reference = [metric.reference_text()] if with_reference else []
            table.add_row(metric.title, found.text(metric.digits + 1, metric.scale), *reference)
        for metric in metrics:
            if reason := _reason_missing(rows, metric.name):
                table.add_row(metric.title, f"not computed: {reason}")
        table.caption = "; ".join(dict.fromkeys(metric.benchmark for metric in shown if metric.benchmark)) or None
        if "scorer" in rows[0]["metrics"]:
            table.add_row("scorer", rows[0]["metrics"]["scorer"])
            table.add_row("precision of the Gumbel noise", result["config"]["sampler"]["gumbel"])
        table.add_row("samples x seeds", f"{rows[0]['num']} x {len(rows)}; 95 % intervals over samples")
        table.add_row("denoiser evaluations (computed)", evaluations_text(rows))
    Terminal().print(table)


def _reason_missing(rows: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """Return why a metric that was requested is not in all rows."""
    missing = (row["metrics"] for row in rows if row["metrics"].get(name) is None)
    return next((found[f"{name}_note"] for found in missing if found.get(f"{name}_note")), None)


def sample_estimate(result: Mapping[str, Any], name: str) -> Estimate:
    """Return the mean over seeds of a metric, and its interval over samples, of a result of `run_evaluation`."""
    value = float(np.mean([row["metrics"][name] for row in result["samples"]]))
    limits = result.get("intervals", {}).get(name, {})  # results of earlier versions have none
    return Estimate(value, **limits)


def _add_likelihoods(table: Table, result: Mapping[str, Any]) -> None:
    for mode, nelbo in result.get("nelbo", {}).items():
        table.add_row(f"NELBO {mode}, nats per token", f"{nelbo['mean']:.4f} ± {nelbo['stderr']:.4f} (standard error)")
    for name, modes in result.get("zero_shot", {}).items():
        for mode, value in modes.items():
            error = value["perplexity"] * value["nelbo"]["stderr"]
            text = f"{value['perplexity']:.2f} ± {error:.2f} (standard error); {value['word_perplexity']:.2f} per word"
            table.add_row(f"zero-shot perplexity of {name}, {mode}", text)
