"""Quality at equal diversity, for models that are sampled in several ways, as at several temperatures.

Ways of one model differ in the distribution that tokens are drawn from. An arm that changes other keys of the sampler
is a model of its own: to interpolate between two samplers would compare with none.

Quality improves where diversity falls, so that two models are compared at the diversity of one of them: the logarithm
of the other's quality is interpolated linearly between the two ways of sampling whose diversities enclose it. Nothing
is extrapolated. Errors are those of all values that enter, with the pairs of one noise, to first order.

Legend: D deviations of a mean over samples (`significance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scmdm.domains.interface import Metric
from scmdm.evaluation.comparison import (
    DrawsBySeed,
    Json,
    TextTable,
    draws_by_seed,
    mean_number,
    values_of_trainings,
)
from scmdm.evaluation.significance import Comparison, holm, mean_deviations, student_interval

_DRAW_KEYS = frozenset(("temperature", "top_k", "top_p", "top_p_first", "top_p_rule"))


@dataclass(frozen=True)
class Way:
    """One way to sample a model: its diversity and the logarithm of its quality."""

    x: float
    log_y: float
    deviations: np.ndarray | None = None  # (2, D), those of x and of log_y; None: not known


@dataclass(frozen=True)
class EqualDiversity:
    """Our model against another one at one T and at the diversity of one of them."""

    steps: int
    models: tuple[str, str]  # labels, ours first
    at: str  # label of the model whose own diversity it is
    x: float
    log_y: tuple[float, float] | None  # ours, theirs; None: the other model was not sampled at this diversity
    compared: Comparison | None  # of the logarithms, ours less theirs; None without an interval


def model_of_arm(arm: Json) -> str:
    """Return the name of the arm whose model and sampler an arm shares, except for the draw of tokens."""
    changed = {override.partition("=")[0] for override in arm.get("sampler", ())}
    return arm["samples_of"] if arm.get("samples_of") and changed <= _DRAW_KEYS else arm["name"]


def interpolate(ways: Sequence[Way], at: Way) -> Way | None:
    """Return a model's quality at the diversity of `at`; None where its ways to sample do not enclose it."""
    for low, high in pairwise(sorted(ways, key=lambda way: way.x)):
        if low.x <= at.x <= high.x:
            return _between(low, high, at)
    return None


def _between(low: Way, high: Way, at: Way) -> Way:
    width = high.x - low.x
    share = (at.x - low.x) / width if width else 0.0
    slope = (high.log_y - low.log_y) / width if width else 0.0
    log_y = (1 - share) * low.log_y + share * high.log_y
    known = [way.deviations for way in (low, high, at) if way.deviations is not None]
    if len(known) < 3 or len({part.shape for part in known}) > 1:
        return Way(at.x, log_y)
    low_2D, high_2D, at_2D = known
    x_D, log_y_D = (1 - share) * low_2D + share * high_2D
    return Way(at.x, log_y, np.stack([at_2D[0], log_y_D + slope * (at_2D[0] - x_D)]))


def compare_at(ours: Way, theirs: Way, means: int) -> Comparison | None:
    """Compare two models at one diversity, `means` being the number of sampling seeds; None without an interval."""
    if ours.deviations is None or theirs.deviations is None or ours.deviations.shape != theirs.deviations.shape:
        return None
    return student_interval(ours.log_y - theirs.log_y, ours.deviations[1] - theirs.deviations[1], means)


def compare_at_equal_diversity(
    samples: Sequence[Json], arms: Sequence[Json], reference: Json, quality: Metric, diversity: Metric
) -> list[EqualDiversity]:
    """Compare the model of the reference arm with each other model, at the diversity of either model's own arm.

    A model's own arm is the one whose model others sample. Nothing is compared if no model is sampled in several ways.
    """
    arms_of: dict[str, list[str]] = {}
    for arm in arms:
        arms_of.setdefault(model_of_arm(arm), []).append(arm["name"])
    if max(map(len, arms_of.values())) < 2:
        return []
    ours = model_of_arm(reference)
    found = []
    for theirs in (model for model in arms_of if model != ours):
        for steps in sorted({row["steps"] for row in samples}):
            drawn = {
                arm: (
                    draws_by_seed(samples, arm, steps, diversity.name),
                    draws_by_seed(samples, arm, steps, quality.name),
                )
                for model in (ours, theirs)
                for arm in arms_of[model]
            }
            found += _compare_models(steps, ours, theirs, {arm: pair for arm, pair in drawn.items() if all(pair)}, arms)
    return found


def _compare_models(
    steps: int,
    ours: str,
    theirs: str,
    drawn: Mapping[str, tuple[DrawsBySeed, DrawsBySeed]],
    arms: Sequence[Json],
) -> list[EqualDiversity]:
    """Compare two models at one T; `drawn` has diversity and quality of each of their arms."""
    if not {ours, theirs} <= set(drawn):
        return []
    model_of = {arm["name"]: model_of_arm(arm) for arm in arms}
    once = {arm["name"] for arm in arms if "base" in (arm["name"], arm.get("samples_of"))}
    labels = {arm["name"]: arm["label"] for arm in arms}
    pairs = [draws for arm, pair in drawn.items() if arm not in once for draws in pair]
    seeds = set.intersection(*map(set, pairs)) if pairs else set()
    sampling = set.intersection(*(set(of_seed) for pair in drawn.values() for d in pair for of_seed in d.values()))
    if not seeds or not sampling:
        return []
    # The base was trained once and goes with every training.
    ways = {arm: _way(*pair, set(pair[0]) if arm in once else seeds, sampling) for arm, pair in drawn.items()}
    found = []
    for model in (theirs, ours):
        at, other = ways[model], theirs if model == ours else ours
        between = interpolate([way for arm, way in ways.items() if model_of[arm] == other], at)
        names = (labels[ours], labels[theirs])
        if between is None:
            found.append(EqualDiversity(steps, names, labels[model], at.x, None, None))
            continue
        first, second = (at, between) if model == ours else (between, at)
        compared = compare_at(first, second, len(sampling))
        found.append(EqualDiversity(steps, names, labels[model], at.x, (first.log_y, second.log_y), compared))
    return found


def _way(diversity: DrawsBySeed, quality: DrawsBySeed, seeds: AbstractSet[int], sampling: AbstractSet[int]) -> Way:
    """Means over trainings and sampling seeds, with their deviations. Raises ValueError for a quality of 0 or less."""
    kept = [
        [{number: draws[seed][number] for number in sorted(sampling)} for seed in sorted(seeds)]
        for draws in (diversity, quality)
    ]
    x, y = (float(np.mean([mean_number(draws) for draws in trainings])) for trainings in kept)
    x_D, y_D = (mean_deviations(values_of_trainings(trainings)) for trainings in kept)
    if x_D is None or y_D is None or len(x_D) != len(y_D):
        return Way(x, math.log(y))
    return Way(x, math.log(y), np.stack([x_D, y_D / y]))


def equal_diversity_table(found: Sequence[EqualDiversity], quality: Metric, diversity: Metric) -> TextTable:
    """Return header and rows of the table of comparisons at equal diversity; p values are adjusted over all of them."""
    header = ["T", "models", "at the diversity of", diversity.title, quality.title, "difference, %", "p, adjusted"]
    adjusted = iter(holm([one.compared.p_value for one in found if one.compared is not None]))
    rows = []
    for one in found:
        start = [
            str(one.steps),
            " against ".join(one.models),
            one.at,
            f"{diversity.scale * one.x:.{diversity.digits}f}",
        ]
        if one.log_y is None:
            other = one.models[1] if one.at == one.models[0] else one.models[0]
            rows.append([*start, f"{other} was not sampled there", "-", "-"])
            continue
        values = " against ".join(f"{quality.scale * math.exp(value):.{quality.digits}f}" for value in one.log_y)
        difference, p_value = _percent(one.log_y[0] - one.log_y[1]), "-"
        if one.compared is not None:
            difference += f" [{_percent(one.compared.low)}, {_percent(one.compared.high)}]"
            p_value = f"{next(adjusted):.2g}"
        rows.append([*start, values, difference, p_value])
    return header, rows


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f}"
