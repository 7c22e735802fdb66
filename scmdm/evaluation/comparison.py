"""Tables and conclusions of a study as text, computed from the rows of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scmdm.domains.interface import Metric
from scmdm.evaluation.statistics import Difference, Interval, mean_interval, paired_difference
from scmdm.observability.run_metrics import format_duration

Json = Mapping[str, Any]
IntervalsByArm = Mapping[str, Mapping[int, Interval]]  # by the arm's label and T
IntervalsByMetric = Mapping[str, IntervalsByArm]


def reference_arm(arms: Sequence[Json], name: str | None) -> Json:
    """Return the arm to compare the others with: the one called `name`, or the first with the largest rate."""
    named = next((arm for arm in arms if arm["name"] == name), None)
    return named or max(arms, key=lambda arm: arm["rate"])


def intervals_by_arm(samples: Sequence[Json], labels: Mapping[str, str], metric: str) -> dict[str, dict[int, Interval]]:
    """Intervals of a metric over seeds, by label and T."""
    found: dict[str, dict[int, Interval]] = {}
    for arm, label in labels.items():
        by_steps: dict[int, Interval] = {}
        for steps in sorted({row["steps"] for row in samples if row["arm"] == arm}):
            numbers = _values(samples, arm, steps, metric)
            if numbers:
                by_steps[steps] = mean_interval(numbers)
        if by_steps:
            found[label] = by_steps
    return found


def _values(samples: Sequence[Json], arm: str, steps: int, metric: str) -> list[float]:
    """One value per sampling seed or, with several adaptation seeds, one mean per adaptation."""
    by_adaptation: dict[int, list[float]] = {}
    for row in samples:
        value = row["metrics"].get(metric)
        if row["arm"] == arm and row["steps"] == steps and value is not None:
            by_adaptation.setdefault(row["adaptation_seed"], []).append(float(value))
    if len(by_adaptation) == 1:
        return next(iter(by_adaptation.values()))
    return [float(np.mean(values)) for values in by_adaptation.values()]


def quality_table(
    values: IntervalsByMetric,
    shown: Sequence[Metric],
    labels: Mapping[str, str],
    samples: Sequence[Json],
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the main table: a row for each T and arm, a column for each metric."""
    header = ["T", "model", "evaluations", "samples", *(metric.title for metric in shown)]
    rows = []
    for steps in sorted({row["steps"] for row in samples}):
        for arm, label in labels.items():
            own = [row for row in samples if row["arm"] == arm and row["steps"] == steps]
            if not own:
                continue
            cells = [
                values[m.name][label][steps].text(m.digits, m.scale) if steps in values[m.name].get(label, {}) else "-"
                for m in shown
            ]
            drawn = f"{len(own)} x {own[0]['num']}"
            rows.append([str(steps), label, str(own[0]["evaluations"]), drawn, *cells])
    return header, rows


def benchmark_table(
    values: IntervalsByMetric,
    shown: Sequence[Metric],
    labels: Mapping[str, str],
    samples: Sequence[Json],
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a benchmark's table: a row for each T and metric, a column for each arm."""
    header = ["T", "metric", "real data", *labels.values()]
    rows = []
    for steps in sorted({row["steps"] for row in samples}):
        for metric in shown:
            found = [values[metric.name].get(label, {}).get(steps) for label in labels.values()]
            cells = ["-" if interval is None else interval.text(metric.digits, metric.scale) for interval in found]
            rows.append([str(steps), metric.title, metric.reference_text() or "-", *cells])
    return header, rows


def cost_table(arms: Sequence[Json], samples: Sequence[Json]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the cost table: training and sampling of each arm, and its NELBO."""
    header = [
        "model",
        "tokens trained on",
        "denoiser evaluations per sequence",
        "training time",
        "time per token / vanilla (concurrent jobs)",
        "sampling, ms per sample and evaluation",
        "NELBO null",
        "NELBO conditioned",
    ]
    vanilla = next((_seconds_per_token(a) for a in arms if a["rate"] == 0 and a["cost"] and a["name"] != "base"), None)
    rows = []
    for arm in arms:
        own = [row for row in samples if row["arm"] == arm["name"]]
        speed = mean_interval([1e3 * row["seconds"] / row["num"] / row["evaluations"] for row in own]).text(3)
        rows.append(
            [arm["label"], *_training_cost(arm, vanilla), speed, *(_nelbo(arm, m) for m in ("null", "conditioned"))]
        )
    return header, rows


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
    values = [entry[mode]["mean"] for entry in arm["nelbo"] if mode in entry]
    known = [value for value in values if value is not None]
    return f"{mean_interval(known).mean:.4f}" if known else "-"


def conclusions(samples: Sequence[Json], arms: Sequence[Json], reference: Json, metric: Metric) -> list[str]:
    """Return sentences that compare the reference with every other arm at each T."""
    lines = []
    for other in arms:
        for steps in sorted({row["steps"] for row in samples}) if other is not reference else ():
            pairs = _pairs(samples, reference["name"], other["name"], steps, metric.name)
            if pairs:
                lines.append(f"T = {steps}: {reference['label']} against {other['label']}: {_sentence(pairs, metric)}")
    return lines


def _pairs(samples: Sequence[Json], ours: str, theirs: str, steps: int, metric: str) -> list[tuple[float, float]]:
    """Return pairs of a metric's values for two arms.

    With one adaptation seed there is a pair per sampling seed, which draws the same noise in both arms. With several,
    there is a pair per adaptation seed, averaged over its sampling seeds, because these are not independent.
    """
    own, other = (_by_seeds(samples, arm, steps, metric) for arm in (ours, theirs))
    if not other:
        return []
    # The base was trained once: its samples are compared with those of every adaptation.
    counterpart = {seed: next(iter(other.values())) if theirs == "base" else other.get(seed, {}) for seed in own}
    paired = [[(own[a][s], counterpart[a][s]) for s in own[a] if s in counterpart[a]] for a in own]
    if len(own) == 1:
        return paired[0]
    return [tuple(np.mean(pairs, axis=0)) for pairs in paired if pairs]


def _by_seeds(samples: Sequence[Json], arm: str, steps: int, metric: str) -> dict[int, dict[int, float]]:
    """Values by adaptation seed and sampling seed."""
    found: dict[int, dict[int, float]] = {}
    for row in samples:
        if row["arm"] == arm and row["steps"] == steps and row["metrics"].get(metric) is not None:
            found.setdefault(row["adaptation_seed"], {})[row["sampling_seed"]] = row["metrics"][metric]
    return found


def _sentence(pairs: Sequence[tuple[float, float]], metric: Metric) -> str:
    ours, theirs = (metric.scale * sum(side) / len(side) for side in zip(*pairs, strict=True))
    unit = metric.unit or f" {metric.title}"
    means = f"{ours:.{metric.digits}f}{unit} against {theirs:.{metric.digits}f}"
    compared = paired_difference(pairs)
    if compared is None:
        return f"{means} (no interval from {len(pairs)} pair(s))"
    return f"{_verdict(compared, metric)}: {means}, {_interval_text(compared, metric)}"


def _verdict(compared: Difference, metric: Metric) -> str:
    if compared.low <= 0 <= compared.high:
        return "no significant difference"
    return "better" if (compared.mean > 0) == (metric.better == "higher") else "worse"


def _interval_text(compared: Difference, metric: Metric) -> str:
    mean, low, high = (f"{metric.scale * x:+.{metric.digits}f}" for x in (compared.mean, compared.low, compared.high))
    return f"difference {mean}, paired 95 % interval [{low}, {high}], p = {compared.p_value:.2g}"


def describe_protocol(samples: Sequence[Json], arms: Sequence[Json]) -> str:
    """Describe the numbers of samples and seeds, and the conditions that all arms share."""
    seeds = sorted({(row["adaptation_seed"], row["sampling_seed"]) for row in samples if row["arm"] != "base"})
    adaptations, draws = len({a for a, _ in seeds}), len({s for _, s in seeds})
    return (
        f"{samples[0]['num']} samples per model, T and seed; {draws} sampling and {adaptations} adaptation seed(s). "
        f"{_training_protocol(arms)} All arms are sampled with the same number of denoiser evaluations "
        "and the same noise. Intervals are over seeds: with one adaptation seed they do not cover the randomness of "
        "training."
    )


def _training_protocol(arms: Sequence[Json]) -> str:
    scratch = [arm["label"] for arm in arms if arm.get("from_scratch")]
    adapted = [arm for arm in arms if arm["name"] != "base" and arm["cost"] and not arm.get("from_scratch")]
    by_seed = zip(*([cost["tokens"] for cost in arm["cost"]] for arm in adapted), strict=True)
    equal = all(len(set(tokens)) == 1 for tokens in by_seed)
    tokens = "the same number of tokens" if equal else "different numbers of tokens (see Cost)"
    others = f" {', '.join(scratch)}: trained from scratch on as many sequences as base and adaptation together."
    return f"Adaptations start from the same base and are trained on {tokens}.{others if scratch else ''}"
