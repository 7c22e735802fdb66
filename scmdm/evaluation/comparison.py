"""Tables and conclusions of a study as text, computed from the rows of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scmdm.domains.interface import Metric
from scmdm.domains.sample_values import SampleValues
from scmdm.evaluation.significance import Comparison, Draws, Estimate, Trainings, compare, estimate, holm
from scmdm.observability.run_metrics import format_duration

Json = Mapping[str, Any]
TextTable = tuple[list[str], list[list[str]]]  # header and rows
LEVEL = 0.05  # of all comparisons of a report together


@dataclass(frozen=True)
class Quality:
    """A metric of an arm at one T."""

    estimate: Estimate  # over samples
    trainings: Trainings  # mean over sampling seeds of each training


QualityByArm = Mapping[str, Mapping[int, Quality]]  # by the arm's label and T
QualityByMetric = Mapping[str, QualityByArm]


def reference_arm(arms: Sequence[Json], name: str | None) -> Json:
    """Return the arm to compare the others with: the one called `name`; if None, the first with the largest rate."""
    if name is None:
        return max(arms, key=lambda arm: arm["rate"])
    return next(arm for arm in arms if arm["name"] == name)


def quality_by_arm(samples: Sequence[Json], labels: Mapping[str, str], metric: str) -> dict[str, dict[int, Quality]]:
    """A metric of each arm, by label and T."""
    found: dict[str, dict[int, Quality]] = {}
    for arm, label in labels.items():
        by_steps = {}
        for steps in sorted({row["steps"] for row in samples if row["arm"] == arm}):
            by_seeds = draws_by_seed(samples, arm, steps, metric)
            if by_seeds:
                by_steps[steps] = _quality(by_seeds)
        if by_steps:
            found[label] = by_steps
    return found


@dataclass(frozen=True)
class Draw:
    """A metric of the samples of one training and sampling seed, and its values for intervals, if known."""

    number: float
    values: SampleValues | None


DrawsBySeed = Mapping[int, Mapping[int, Draw]]  # by adaptation seed and sampling seed


def draws_by_seed(samples: Sequence[Json], arm: str, steps: int, metric: str) -> dict[int, dict[int, Draw]]:
    """A metric of an arm at one T, by adaptation seed and sampling seed, where it was computed."""
    found: dict[int, dict[int, Draw]] = {}
    for row in samples:
        if row["arm"] == arm and row["steps"] == steps and row["metrics"].get(metric) is not None:
            draw = Draw(float(row["metrics"][metric]), row["values"].get(metric))
            found.setdefault(row["adaptation_seed"], {})[row["sampling_seed"]] = draw
    return found


def _quality(by_seeds: DrawsBySeed) -> Quality:
    trainings = Trainings(tuple(mean_number(draws) for _, draws in sorted(by_seeds.items())))
    alike = len({frozenset(draws) for draws in by_seeds.values()}) == 1
    return Quality(estimate(trainings.mean, values_of_trainings(list(by_seeds.values())) if alike else []), trainings)


def mean_number(draws: Mapping[int, Draw]) -> float:
    """Mean of a metric over sampling seeds."""
    return float(np.mean([draw.number for draw in draws.values()]))


def values_of_trainings(trainings: Sequence[Mapping[int, Draw]]) -> list[Draws]:
    """Values of each training, in the order of the sampling seeds; empty if those of a draw are not known."""
    found = [[draws[seed].values for seed in sorted(draws)] for draws in trainings]
    known = [[values for values in own if values is not None] for own in found]
    return list(known) if sum(map(len, known)) == sum(map(len, found)) else []


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
    values = [entry[mode]["mean"] for entry in arm["nelbo"] if mode in entry]
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.4f}" if known else "-"


@dataclass(frozen=True)
class ArmComparison:
    """The reference against another arm at one T, on the noise that both were sampled with."""

    steps: int
    ours: str  # labels
    theirs: str
    means: tuple[float, float]
    compared: Comparison | None  # over samples
    differences: Trainings  # of each training


def compare_arms(samples: Sequence[Json], arms: Sequence[Json], reference: Json, metric: Metric) -> list[ArmComparison]:
    """Compare the reference with every other arm at each T."""
    found = []
    for other in arms:
        for steps in sorted({row["steps"] for row in samples}) if other is not reference else ():
            ours, theirs = (draws_by_seed(samples, arm["name"], steps, metric.name) for arm in (reference, other))
            both = _paired(ours, theirs)
            if both is not None:
                found.append(_compare(steps, (reference["label"], other["label"]), *both))
    return found


_Draws = Sequence[Mapping[int, Draw]]  # of each training, by sampling seed


def _paired(ours: DrawsBySeed, theirs: DrawsBySeed) -> tuple[_Draws, _Draws] | None:
    """Draws of the same trainings and the same noise; None if there are none.

    An arm of one training, such as the base, is compared with every training of the other.
    """
    single = 1 in (len(ours), len(theirs))
    shared_seeds = sorted(set(ours) & set(theirs))
    sides = tuple([draws[seed] for seed in (sorted(draws) if single else shared_seeds)] for draws in (ours, theirs))
    if not all(sides):
        return None
    shared = set.intersection(*(set(draws) for side in sides for draws in side))
    first, second = ([{seed: draws[seed] for seed in shared} for draws in side] for side in sides)
    return (first, second) if shared else None


def _compare(steps: int, labels: tuple[str, str], ours: _Draws, theirs: _Draws) -> ArmComparison:
    first, second = ([mean_number(draws) for draws in side] for side in (ours, theirs))
    count = max(len(first), len(second))
    pairs = zip(*(side * count if len(side) == 1 else side for side in (first, second)), strict=True)
    differences = Trainings(tuple(a - b for a, b in pairs))
    compared = compare(differences.mean, values_of_trainings(ours), values_of_trainings(theirs))
    return ArmComparison(steps, *labels, (float(np.mean(first)), float(np.mean(second))), compared, differences)


def conclusions(found: Sequence[ArmComparison], metric: Metric) -> list[str]:
    """Return a sentence for each comparison. Verdicts hold for all of them together (Holm)."""
    tested = [one.compared.p_value for one in found if one.compared is not None]
    adjusted = iter(holm(tested))
    return [
        f"T = {one.steps}: {one.ours} against {one.theirs}: "
        f"{_sentence(one, metric, None if one.compared is None else next(adjusted))}"
        for one in found
    ]


def _sentence(one: ArmComparison, metric: Metric, adjusted: float | None) -> str:
    ours, theirs = (f"{metric.scale * mean:.{metric.digits}f}" for mean in one.means)
    means = f"{ours}{metric.unit or f' {metric.title}'} against {theirs}"
    trainings = _trainings_text(one.differences, metric)
    if one.compared is None or adjusted is None:
        return f"{means} (no interval over samples){trainings}"
    compared = one.compared
    difference, low, high = (
        f"{metric.scale * x:+.{metric.digits}f}" for x in (compared.difference, compared.low, compared.high)
    )
    verdict = _verdict(compared, adjusted, metric)
    p_values = f"p = {compared.p_value:.2g}, adjusted {adjusted:.2g}"
    return f"{verdict}: {means}, difference {difference} [{low}, {high}], {p_values}{trainings}"


def _trainings_text(differences: Trainings, metric: Metric) -> str:
    if len(differences.values) == 1:
        return ""
    each = ", ".join(f"{metric.scale * value:+.{metric.digits}f}" for value in differences.values)
    return f"; each training: {each} ({'all of one sign' if differences.agree else 'not all of one sign'})"


def _verdict(compared: Comparison, adjusted: float, metric: Metric) -> str:
    if adjusted >= LEVEL:
        return "no significant difference"
    higher = compared.difference > 0
    if not metric.better:
        return "higher" if higher else "lower"
    return "better" if higher == (metric.better == "higher") else "worse"


def describe_protocol(samples: Sequence[Json], arms: Sequence[Json], found: Sequence[ArmComparison]) -> str:
    """Describe the numbers of samples and seeds, the conditions that all arms share, and what intervals mean."""
    seeds = sorted({(row["adaptation_seed"], row["sampling_seed"]) for row in samples if row["arm"] != "base"})
    tested = sum(one.compared is not None for one in found)
    adaptations, draws = len({a for a, _ in seeds}), len({s for _, s in seeds})
    return (
        f"{samples[0]['num']} samples per model, T and seed; {draws} sampling and {adaptations} adaptation seed(s). "
        f"{_training_protocol(arms)} All arms are sampled with the same number of steps T and the "
        "same noise; without a carried estimate, steps that reveal nothing are not computed. "
        "Intervals are 95 % over samples, conditional on the trained models: they do not cover the randomness of "
        "training, which the values of each training run show. Metrics without an interval have none: it would cost "
        "too much, or the samples' values were not kept. Differences are paired by noise. "
        f"There are {tested} comparisons; adjusted p values (Holm) and the verdicts hold for all of them together."
    )


def _training_protocol(arms: Sequence[Json]) -> str:
    scratch = [arm["label"] for arm in arms if arm.get("from_scratch")]
    adapted = [arm for arm in arms if arm["name"] != "base" and arm["cost"] and not arm.get("from_scratch")]
    others = f"{', '.join(scratch)}: trained from scratch on as many sequences as base and adaptation together."
    if not adapted:
        return others if scratch else "No arm is an adaptation."
    by_seed = zip(*([cost["tokens"] for cost in arm["cost"]] for arm in adapted), strict=True)
    equal = all(len(set(tokens)) == 1 for tokens in by_seed)
    tokens = "the same number of tokens" if equal else "different numbers of tokens (see Cost)"
    start = f"Adaptations start from the same base and are trained on {tokens}."
    return f"{start} {others}" if scratch else start
