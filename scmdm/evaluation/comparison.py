"""Comparisons of the arms of a study, and its conclusions as text, computed from the rows of its evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scmdm.domains.interface import Metric
from scmdm.domains.sample_values import SampleValues
from scmdm.evaluation.significance import Comparison, Draws, Estimate, Trainings, compare, estimate, holm

Json = Mapping[str, Any]
LEVEL = 0.05  # of all comparisons of a report together
_EQUAL_COUNTS = 0.02  # largest relative difference of numbers of samples by which a distance is hardly biased


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
    samples: int


DrawsBySeed = Mapping[int, Mapping[int, Draw]]  # by adaptation seed and sampling seed


def draws_by_seed(samples: Sequence[Json], arm: str, steps: int, metric: str) -> dict[int, dict[int, Draw]]:
    """A metric of an arm at one T, by adaptation seed and sampling seed, where it was computed."""
    found: dict[int, dict[int, Draw]] = {}
    for row in samples:
        if row["arm"] == arm and row["steps"] == steps and row["metrics"].get(metric) is not None:
            draw = Draw(float(row["metrics"][metric]), row["values"].get(metric), row["num"])
            found.setdefault(row["adaptation_seed"], {})[row["sampling_seed"]] = draw
    return found


def missing_values(samples: Sequence[Json], labels: Mapping[str, str], metrics: Sequence[Metric]) -> list[str]:
    """Return a line for each metric, arm and T of which some evaluations have no value and others have one."""
    found = []
    for metric in metrics:
        for arm, label in labels.items():
            for steps in sorted({row["steps"] for row in samples if row["arm"] == arm}):
                own = [row for row in samples if row["arm"] == arm and row["steps"] == steps]
                known = sum(row["metrics"].get(metric.name) is not None for row in own)
                if known < len(own):
                    found.append(
                        f"{metric.title}: {label}, T = {steps}: {known} of {len(own)} evaluations have a value"
                    )
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


@dataclass(frozen=True)
class ArmComparison:
    """The reference against another arm at one T, on the noise that both were sampled with."""

    steps: int
    ours: str  # labels
    theirs: str
    means: tuple[float, float]
    compared: Comparison | None  # over samples
    differences: Trainings  # of each training
    left_out: tuple[int, ...] = ()  # adaptation seeds that only one of the two has
    counted: tuple[float, float] | None = None  # samples that a biased metric is computed from, where they differ


def compare_arms(
    samples: Sequence[Json], arms: Sequence[Json], reference: Json, metric: Metric
) -> tuple[list[ArmComparison], list[str]]:
    """Compare the reference with every other arm at each T.

    Returns the comparisons, and a line for each that is not possible, because the two have no common noise.
    """
    found, impossible = [], []
    for other in arms:
        for steps in sorted({row["steps"] for row in samples}) if other is not reference else ():
            ours, theirs = (draws_by_seed(samples, arm["name"], steps, metric.name) for arm in (reference, other))
            both = _paired(ours, theirs, once=trained_once(reference) or trained_once(other))
            labels = (reference["label"], other["label"])
            if both is None:
                reason = f"{metric.title} of equally many samples of one training and one noise is not known of both"
                impossible.append(f"T = {steps}: {labels[0]} is not compared with {labels[1]}: {reason}")
            else:
                one = _compare(steps, labels, *both)
                found.append(replace(one, counted=_unequal_counts(samples, (reference, other), steps, metric)))
    return found, impossible


def _unequal_counts(
    samples: Sequence[Json], arms: tuple[Json, Json], steps: int, metric: Metric
) -> tuple[float, float] | None:
    """Mean numbers of samples that a metric is computed from; None if they hardly differ, or do not bias it."""
    found = []
    for arm in arms if metric.counted else ():
        own = [row["metrics"] for row in samples if row["arm"] == arm["name"] and row["steps"] == steps]
        known = [row[metric.counted] for row in own if row.get(metric.counted) is not None]
        found.append(float(np.mean(known)) if known else 0.0)
    if not found or abs(found[0] - found[1]) <= _EQUAL_COUNTS * max(found):
        return None
    return found[0], found[1]


def trained_once(arm: Json) -> bool:
    """Whether an arm's model is the base, which goes with every training of the others."""
    return "base" in (arm["name"], arm.get("samples_of"))


_Draws = Sequence[Mapping[int, Draw]]  # of each training, by sampling seed


def _paired(ours: DrawsBySeed, theirs: DrawsBySeed, once: bool) -> tuple[_Draws, _Draws, tuple[int, ...]] | None:
    """Draws of the same trainings and the same noise, and the seeds of the other trainings; None if there are none.

    With `once`, one of the two was trained once, and is compared with every training of the other.
    """
    shared_seeds = sorted(set(ours) & set(theirs))
    left_out = () if once else tuple(sorted(set(ours) ^ set(theirs)))
    sides = tuple([draws[seed] for seed in (sorted(draws) if once else shared_seeds)] for draws in (ours, theirs))
    if not all(sides):
        return None
    shared = set.intersection(*(set(draws) for side in sides for draws in side))
    first, second = ([{seed: draws[seed] for seed in shared} for draws in side] for side in sides)
    equal = len({draw.samples for side in (first, second) for draws in side for draw in draws.values()}) == 1
    return (first, second, left_out) if equal else None


def _compare(
    steps: int, labels: tuple[str, str], ours: _Draws, theirs: _Draws, left_out: tuple[int, ...]
) -> ArmComparison:
    first, second = ([mean_number(draws) for draws in side] for side in (ours, theirs))
    count = max(len(first), len(second))
    pairs = zip(*(side * count if len(side) == 1 else side for side in (first, second)), strict=True)
    differences = Trainings(tuple(a - b for a, b in pairs))
    compared = compare(differences.mean, values_of_trainings(ours), values_of_trainings(theirs))
    means = (float(np.mean(first)), float(np.mean(second)))
    return ArmComparison(steps, *labels, means, compared, differences, left_out)


def conclusions(
    found: Sequence[ArmComparison], metric: Metric, beside: tuple[Metric, Sequence[ArmComparison]] | None = None
) -> list[str]:
    """Return a sentence for each comparison. Verdicts hold for all of them together (Holm).

    `beside` is a metric of diversity with its comparisons of the same arms, which is stated where the metric cannot be
    judged without it.
    """
    tested = [one.compared.p_value for one in found if one.compared is not None]
    adjusted = iter(holm(tested))
    others = {} if beside is None else {(one.steps, one.theirs): one for one in beside[1]}
    sentences = []
    for one in found:
        text = _sentence(one, metric, None if one.compared is None else next(adjusted))
        other = others.get((one.steps, one.theirs))
        at = f"; {beside[0].title}: {_numbers(other, beside[0])}" if beside is not None and other is not None else ""
        sentences.append(f"T = {one.steps}: {one.ours} against {one.theirs}: {text}{at}")
    return sentences


def _sentence(one: ArmComparison, metric: Metric, adjusted: float | None) -> str:
    numbers, trainings = _numbers(one, metric, metric.unit or f" {metric.title}"), _trainings_text(one, metric)
    if one.compared is None or adjusted is None:
        return f"{numbers} (no interval over samples){trainings}"
    p_values = f"p = {one.compared.p_value:.2g}, adjusted {adjusted:.2g}"
    verdict = _verdict(one, one.compared, adjusted, metric)
    biased = ""
    if one.counted is not None:
        first, second = (f"{count:.0f}" for count in one.counted)
        biased = f"; of {first} and {second} samples: the distance of fewer samples is larger for that reason alone"
    return f"{verdict}: {numbers}, {p_values}{trainings}{biased}"


def _numbers(one: ArmComparison, metric: Metric, unit: str = "") -> str:
    """Both means and their difference with its interval, if it has one."""
    ours, theirs = (f"{metric.scale * mean:.{metric.digits}f}" for mean in one.means)
    means = f"{ours}{unit} against {theirs}"
    if one.compared is None:
        return means
    difference, low, high = (
        f"{metric.scale * x:+.{metric.digits}f}" for x in (one.compared.difference, one.compared.low, one.compared.high)
    )
    return f"{means}, difference {difference} [{low}, {high}]"


def _trainings_text(one: ArmComparison, metric: Metric) -> str:
    seeds = ", ".join(map(str, one.left_out))
    left_out = f"; without adaptation seed(s) {seeds}, of which one model has no value" if seeds else ""
    if len(one.differences.values) == 1:
        return left_out
    each = ", ".join(f"{metric.scale * value:+.{metric.digits}f}" for value in one.differences.values)
    agree = "all of one sign" if one.differences.agree else "not all of one sign"
    return f"; each training: {each} ({agree}){left_out}"


def _verdict(one: ArmComparison, compared: Comparison, adjusted: float, metric: Metric) -> str:
    if adjusted >= LEVEL:
        return "no significant difference"
    higher = compared.difference > 0
    # Neither diversity that may have paid for a quality, nor a bias that differs, is part of the number.
    if not metric.better or metric.frontier or one.counted is not None:
        return "higher" if higher else "lower"
    return "better" if higher == (metric.better == "higher") else "worse"


def describe_protocol(
    samples: Sequence[Json], arms: Sequence[Json], found: Sequence[ArmComparison], others: int
) -> str:
    """Describe the numbers of samples and seeds, the conditions that all arms share, and what intervals mean.

    `others` is the number of evaluations in the directory of the study that the report leaves out.
    """
    seeds = sorted({(row["adaptation_seed"], row["sampling_seed"]) for row in samples if row["arm"] != "base"})
    tested = sum(one.compared is not None for one in found)
    adaptations, draws = len({a for a, _ in seeds}), len({s for _, s in seeds})
    steps = "All arms are sampled with the same number of steps T and the same noise"
    others_than_T = {row["arm"] for row in samples if row["evaluations"] != row["steps"]}
    if others_than_T:
        labels = ", ".join(arm["label"] for arm in arms if arm["name"] in others_than_T)
        steps += f", but {labels} with another number of evaluations (see Metrics)"
    trainings = (
        "a difference may be one between two trainings of the same configuration"
        if adaptations == 1
        else "the difference of each training is listed; trainings share the noise of their samples, so that equal "
        "signs say less than those of independent experiments"
    )
    left_out = (
        f" The directory has {others} further evaluations, of other arms, T or seeds, which are not among them."
        if others
        else ""
    )
    return (
        f"{samples[0]['num']} samples per model, T and seed; {draws} sampling and {adaptations} adaptation seed(s). "
        f"{_training_protocol(arms)} {steps}; without a carried estimate, steps that reveal nothing are not computed. "
        "Intervals are 95 % over samples, each for one value or one comparison, conditional on the trained models and "
        f"on the held-out data. They do not cover the randomness of training: {trainings}. Metrics without an interval "
        "have none: it would cost too much, samples' values were not kept, or they do not vary. Differences are paired "
        f"by noise. There are {tested} comparisons; adjusted p values (Holm) and the verdicts hold for all of them "
        f"together.{left_out}"
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
