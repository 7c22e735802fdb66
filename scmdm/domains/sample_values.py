"""What intervals over samples need of a metric: its value for each sample, or its values without groups of samples.

Legend: N samples, G groups of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scmdm.system.npz_files import read_npz, write_npz
from scmdm.system.untrusted import reading

Numbers = Sequence[float] | np.ndarray
GROUPS = 200  # at most
_SHAPES = {"mean": (None,), "ratio": (2, None), "exp_ratio": (2, None), "jackknife": (None,)}
_REMEDY = "remove the evaluation that names it, and run the study again"


@dataclass(frozen=True)
class SampleValues:
    """The values from which a metric is computed, in the order in which the samples were drawn. `kind` is one of

    - `mean`: values (N,), booleans for a proportion; NaN for a sample without a value;
    - `ratio`, `exp_ratio`: parts and weights (2, N), the metric is `sum(parts) / sum(weights)` or its exponential;
    - `jackknife`: the metric (G,) without each group of `without_groups`, for metrics of the whole set of samples.
    """

    kind: str
    array: np.ndarray

    @classmethod
    def mean(cls, values_N: Numbers) -> SampleValues:
        """Values of a metric that is their mean."""
        return cls("mean", np.asarray(values_N))

    @classmethod
    def ratio(cls, parts_N: Numbers, weights_N: Numbers, *, exponential: bool = False) -> SampleValues:
        """Values of a metric that is `sum(parts) / sum(weights)`, or its exponential."""
        kind = "exp_ratio" if exponential else "ratio"
        return cls(kind, np.array([parts_N, weights_N], np.float64).reshape(2, -1))

    @classmethod
    def jackknife(cls, metric: Callable[[np.ndarray], float], samples: int) -> SampleValues:
        """Values of a metric of a set, which is a function of how often each sample occurs, int64 (N,).

        A metric that is not defined without a group is NaN.
        """
        return cls("jackknife", np.array([metric(counts_N) for counts_N in without_groups(samples)]))

    @property
    def is_share(self) -> bool:
        """True if the metric is the proportion of samples with a property."""
        return self.kind == "mean" and self.array.dtype == bool

    @property
    def is_fraction(self) -> bool:
        """True if the metric is a share or a ratio of a part to its whole, between 0 and 1."""
        if self.kind != "ratio":
            return self.is_share
        parts_N, weights_N = self.array
        return bool(((parts_N >= 0) & (parts_N <= weights_N)).all())

    def ratio_parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Parts and weights, float64 (N,) each, of a mean or a ratio."""
        if self.kind == "mean":
            values_N = self.array.astype(np.float64)
            known_N = ~np.isnan(values_N)
            return np.where(known_N, values_N, 0.0), known_N.astype(np.float64)
        return self.array[0], self.array[1]

    def value(self) -> float | None:
        """The metric of a mean or a ratio; None without samples that have a value."""
        parts_N, weights_N = self.ratio_parts()
        if not weights_N.sum():
            return None
        ratio = parts_N.sum() / weights_N.sum()
        return float(np.exp(ratio) if self.kind == "exp_ratio" else ratio)


def first_occurrences(items: Sequence[Hashable]) -> np.ndarray:
    """Whether each item is the first of its kind, bool (N,)."""
    first = {item: index for index, item in reversed(list(enumerate(items)))}
    return np.array([first[item] == index for index, item in enumerate(items)], bool)


def distinct_parts(items: Sequence[Iterable[Hashable]]) -> np.ndarray:
    """Return parts of the samples, float64 (N,), whose sum is the number of distinct items of all of them.

    They vary as the number of items that only this sample has, by which the sum falls without it, so that the error of
    a ratio of these parts is the jackknife's. What several samples have is divided among all.
    """
    owner: dict[Hashable, int | None] = {}  # the sample that alone has an item; None: several
    for index, own in enumerate(items):
        for item in set(own):
            owner[item] = None if item in owner else index
    alone_N = np.zeros(len(items))
    for sample in owner.values():
        if sample is not None:
            alone_N[sample] += 1
    return alone_N + (len(owner) - alone_N.sum()) / max(1, len(items))


def without_groups(samples: int) -> Iterator[np.ndarray]:
    """Yield 0 for the samples of one group and 1 for all others, int64 (N,), for each group.

    Groups are neighbours in the order of drawing, the same for all models; up to `GROUPS` samples they are single ones.
    """
    groups = min(GROUPS, samples)
    group_N = np.arange(samples) * groups // samples
    for group in range(groups):
        yield (group_N != group).astype(np.int64)


def write_values(path: Path, values: Mapping[str, SampleValues]) -> None:
    """Write the values of a draw by metric."""
    write_npz(path, {f"{found.kind}/{name}": found.array for name, found in values.items()})


def read_values(path: Path) -> dict[str, SampleValues]:
    """Read a file of `write_values`. Raises UserError if it is damaged."""
    arrays = read_npz(path, _REMEDY)
    with reading(path, "file of values of samples", _REMEDY):
        return {name: _checked(kind, array) for key, array in arrays.items() for kind, name in [_split(key)]}


def _split(key: str) -> tuple[str, str]:
    kind, _, name = key.partition("/")
    return kind, name


def _checked(kind: str, array: np.ndarray) -> SampleValues:
    shape = _SHAPES[kind]
    fits = array.ndim == len(shape) and shape[0] in (None, array.shape[0]) and array.size
    if not fits or array.dtype not in (np.bool_, np.float64):
        raise ValueError(f"{kind} of shape {array.shape} and {array.dtype}")
    return SampleValues(kind, array)
