"""Quality at equal diversity, for models that are sampled in several ways, as at several temperatures.

Ways of one model differ in the distribution that tokens are drawn from. An arm that changes other keys of the sampler
is a model of its own: to interpolate between two samplers would compare with none.

Quality improves where diversity falls, so that two models are compared at the diversity of one of them: the logarithm
of the other's quality is interpolated linearly between the two ways of sampling whose diversities enclose it. Nothing
is extrapolated. Errors are those of all values that enter, with the pairs of one noise, to first order. They do not
cover the curvature between the two ways, which is why the table names their diversities.

Legend: D deviations of a mean over samples (`significance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from scmdm.domains.interface import Metric
from scmdm.evaluation.comparison import DrawsBySeed, Json, draws_by_seed, mean_number, trained_once, values_of_trainings
from scmdm.evaluation.significance import Comparison, holm, mean_deviations, student_interval
from scmdm.evaluation.study_tables import TextTable

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
    x: float = math.nan
    log_y: tuple[float, float] | None = None  # ours, theirs; None: not compared
    compared: Comparison | None = None  # of the logarithms, ours less theirs; None without an interval
    between: tuple[float, float] | None = None  # diversities between which the other model is interpolated
    each: tuple[float | None, ...] = ()  # difference of the logarithms in each training; None: not enclosed there
    reason: str = ""  # why there is no comparison


def model_of_arm(arm: Json) -> str:
    """Return the name of the arm whose model and sampler an arm shares, except for the draw of tokens."""
    changed = {override.partition("=")[0] for override in arm.get("sampler", ())}
    return arm["samples_of"] if arm.get("samples_of") and changed <= _DRAW_KEYS else arm["name"]


def interpolate(ways: Sequence[Way], at: Way) -> Way | None:
    """Return a model's quality at the diversity of `at`; None where its ways to sample do not enclose it."""
    found = _enclosing([way.x for way in ways], at.x)
    return None if found is None else _between(ways[found[0]], ways[found[1]], at)


def _enclosing(x: Sequence[float], at: float) -> tuple[int, int] | None:
    """Return the places of the two neighbouring diversities that enclose `at`; None where none do."""
    for low, high in pairwise(sorted(range(len(x)), key=lambda index: x[index])):
        if x[low] <= at <= x[high]:
            return low, high
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
            drawn = {}
            for arm in arms:
                x, y = (draws_by_seed(samples, arm["name"], steps, metric.name) for metric in (diversity, quality))
                if x and y and arm["name"] in (*arms_of[ours], *arms_of[theirs]):
                    drawn[arm["name"]] = _SampledArm(arm, x, y)
            found += _compare_models(steps, ours, theirs, drawn)
    return found


@dataclass(frozen=True)
class _SampledArm:
    """Diversity and quality of an arm at one T."""

    arm: Json
    diversity: DrawsBySeed
    quality: DrawsBySeed

    @property
    def seeds(self) -> set[int]:
        return set(self.diversity) & set(self.quality)

    @property
    def sampling_seeds(self) -> set[int]:
        return set.intersection(*(set(draws) for found in (self.diversity, self.quality) for draws in found.values()))

    def way(self, seeds: AbstractSet[int], sampling: AbstractSet[int]) -> Way:
        """Mean over trainings, which the base does not have, and sampling seeds, with deviations.

        Raises ValueError for a quality of 0 or less.
        """
        own = self.seeds if trained_once(self.arm) else seeds
        kept = [
            [{number: draws[seed][number] for number in sorted(sampling)} for seed in sorted(own)]
            for draws in (self.diversity, self.quality)
        ]
        x, y = (float(np.mean([mean_number(draws) for draws in trainings])) for trainings in kept)
        x_D, y_D = (mean_deviations(values_of_trainings(trainings)) for trainings in kept)
        if x_D is None or y_D is None or len(x_D) != len(y_D):
            return Way(x, math.log(y))
        return Way(x, math.log(y), np.stack([x_D, y_D / y]))


def _common_seeds(arms: Sequence[_SampledArm]) -> set[int]:
    """Seeds of the trainings that all arms have; the base goes with every training."""
    trained = [arm.seeds for arm in arms if not trained_once(arm.arm)]
    return set.intersection(*(trained or [arm.seeds for arm in arms]))


def _compare_models(steps: int, ours: str, theirs: str, drawn: Mapping[str, _SampledArm]) -> list[EqualDiversity]:
    """Compare two models at one T, at the diversity of either's own arm."""
    if not {ours, theirs} <= set(drawn):
        return []
    models = (drawn[ours].arm["label"], drawn[theirs].arm["label"])
    found = []
    for at, other in ((theirs, ours), (ours, theirs)):
        ways = [sampled for sampled in drawn.values() if model_of_arm(sampled.arm) == other]
        blank = EqualDiversity(steps, models, drawn[at].arm["label"])
        found.append(_compare_with(blank, drawn[at], ways))
    return found


def _compare_with(blank: EqualDiversity, at: _SampledArm, ways: Sequence[_SampledArm]) -> EqualDiversity:
    """Compare an arm with the other model, sampled in several ways, on the trainings and noise that all three have."""
    sampling = set.intersection(*(sampled.sampling_seeds for sampled in (at, *ways)))
    ways = [sampled for sampled in ways if _common_seeds([at, sampled])]
    if not ways or not sampling:
        return replace(blank, reason="they have no training and noise in common")
    x = at.way(at.seeds, sampling).x
    enclosing = _enclosing([sampled.way(_common_seeds([at, sampled]), sampling).x for sampled in ways], x)
    if enclosing is None:
        return replace(blank, x=x, reason="the other was not sampled there")
    pair = [ways[index] for index in enclosing]
    seeds = _common_seeds([at, *pair])
    if not seeds:
        return replace(blank, x=x, reason="they have no training in common")
    own, low, high = (sampled.way(seeds, sampling) for sampled in (at, *pair))
    between = interpolate([low, high], own)
    if between is None:
        return replace(blank, x=own.x, reason="the other was not sampled there in the trainings of both")
    ours_first = blank.at == blank.models[0]
    first, second = (own, between) if ours_first else (between, own)
    sign = 1 if ours_first else -1
    alone = [[sampled.way({seed}, sampling) for sampled in (at, *pair)] for seed in sorted(seeds)]
    each = [(one, interpolate(enclosed, one)) for one, *enclosed in alone] if len(seeds) > 1 else []
    return replace(
        blank,
        x=own.x,
        log_y=(first.log_y, second.log_y),
        compared=compare_at(first, second, len(sampling)),
        between=(low.x, high.x),
        each=tuple(None if found is None else sign * (one.log_y - found.log_y) for one, found in each),
    )


def equal_diversity_table(found: Sequence[EqualDiversity], quality: Metric, diversity: Metric) -> TextTable:
    """Return header and rows of the table of comparisons at equal diversity; p values are adjusted over all of them."""
    tested = [one.compared.p_value for one in found if one.compared is not None]
    ours = found[0].models[0] if found else ""
    header = ["T", f"{ours} against", "at the diversity of", diversity.title, "interpolated between", quality.title]
    header += ["difference, %", f"adjusted p (of {len(tested)})", "each training, %"]
    adjusted = iter(holm(tested))
    rows = []
    for one in found:
        start = [str(one.steps), one.models[1], one.at, _number(one.x, diversity)]
        if one.log_y is None or one.between is None:
            rows.append([*start, "-", one.reason, "-", "-", "-"])
            continue
        between = " and ".join(_number(x, diversity) for x in one.between)
        values = " against ".join(_number(math.exp(value), quality) for value in one.log_y)
        difference, p_value = _percent(one.log_y[0] - one.log_y[1]), "-"
        if one.compared is not None:
            difference += f" [{_percent(one.compared.low)}, {_percent(one.compared.high)}]"
            p_value = f"{next(adjusted):.2g}"
        each = ", ".join("-" if value is None else _percent(value) for value in one.each)
        rows.append([*start, between, values, difference, p_value, each or "-"])
    return header, rows


def _number(value: float, metric: Metric) -> str:
    return "-" if math.isnan(value) else f"{metric.scale * value:.{metric.digits}f}"


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f}"
