"""The interface between evaluation and domains.

A domain is one folder of `scmdm.domains`: `domain.py` (the class) and, where it has them, `config.py` (its keys in the
section `metrics`), `metrics.py` and `figures.py`. It is registered in `scmdm.domains.domain_registry`; other packages
register theirs by an entry point of the group `scmdm.domains`.

Legend: N samples, L sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import Tokenizer, block_text, load_tokenizer
from scmdm.diffusion.cached_windows import CacheDeviation
from scmdm.domains.sample_values import SampleValues


@dataclass(frozen=True)
class GeneratedSamples:
    """Samples in the order in which they were drawn, and their cost."""

    tokens: Tensor  # (N, L) int64, on the CPU
    texts: list[str]  # up to the first [EOS]; the whole sequence for a model of concatenated texts
    framed: list[bool]  # [BOS], [EOS] and padding are placed as in the data; otherwise the text is a fragment
    counts: list[int]  # denoiser evaluations of each sample
    seconds: float  # of all starts, mean of the ranks
    labels: list[str] | None = None  # class that each sample is conditioned on
    scores: dict[str, np.ndarray] | None = None  # of `ScoringDomain.scores`, if they were computed before
    positions: list[int] | None = None  # token positions that the denoiser computed for each sample
    cache_deviation: CacheDeviation | None = None  # of an approximate cache

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations per sample: the maximum, because blocks that a prompt fills need none."""
        return max(self.counts)

    @property
    def computed_evaluations(self) -> float | None:
        """Evaluations that the denoiser has computed per sample, on average; None if not counted.

        Those of windows count as the part of the sequence that they are. Samples must not be padded.
        """
        return None if self.positions is None else sum(self.positions) / self.tokens.numel()

    def at(self, numbers: Sequence[int]) -> GeneratedSamples:
        """Return some of the samples, without scores."""
        return replace(
            self,
            tokens=self.tokens[list(numbers)],
            texts=[self.texts[number] for number in numbers],
            framed=[self.framed[number] for number in numbers],
            counts=[self.counts[number] for number in numbers],
            positions=None if self.positions is None else [self.positions[number] for number in numbers],
            labels=None if self.labels is None else [self.labels[number] for number in numbers],
            scores=None,
        )


@dataclass(frozen=True)
class Measured:
    """Metrics of a set of samples, by name, and what intervals over samples need of them."""

    metrics: dict[str, Any]  # JSON values; None: the metric cannot be computed
    values: dict[str, SampleValues] = field(default_factory=dict)  # a metric that is not here has no interval


@dataclass(frozen=True)
class Metric:
    """Display settings of one number returned by `Domain.measure`.

    If the number is None although it was requested, `Domain.measure` gives the reason as `NAME_note`.
    """

    name: str
    title: str
    better: str = ""  # "higher", "lower", or "" if the number has no preferred direction
    scale: float = 1.0  # displayed value = scale * number
    digits: int = 3
    unit: str = ""  # appended to the value in sentences
    in_figure: bool = True
    benchmark: str = ""  # published benchmark that defines the metric; each benchmark has its own table and figure
    reference: float | None = None  # value of real data published with the benchmark
    maximum: float | None = None  # largest possible value
    frontier: str = ""  # axis, x or y, in the figure of quality against diversity
    counted: str = ""  # number of samples that a biased distance is computed from, such as `num_valid`; empty: all

    def reference_text(self) -> str:
        """Format the reference value; empty without one."""
        return "" if self.reference is None else f"{self.scale * self.reference:.{self.digits}f}"


def with_floor(metric: Metric, title: str) -> tuple[Metric, Metric]:
    """Return a distance, and its floor, called `title`: the distance of an equal number of training samples."""
    return metric, replace(metric, name=f"{metric.name}_floor", title=title, better="", in_figure=False)


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation that are common to all domains."""

    split: str = "test"  # held-out data that samples are compared with
    device: str = "cpu"
    exclusive: bool = False  # no other scmdm job is running: use all cores, and show progress


@dataclass
class MetricKeys:
    """Base of a domain's `Config`, its keys in the section `metrics`; domains without keys use it directly."""

    @property
    def exclusive_setup(self) -> bool:
        """True if making the domain is slow and uses all cores, so that no other job should run at that time."""
        return False


class Domain(Protocol):
    """Metrics and figures of one kind of sample.

    An instance holds the reference data. Make it once for many evaluations of the same data set.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]  # studies compare models by the first, unless they name another
    Config: ClassVar[type[MetricKeys]]  # dataclass of the domain's keys in the section `metrics`

    def __init__(self, root: Path, manifest: Manifest, config: Any, settings: EvaluationSettings) -> None:
        """Read the reference data of the data set at `root`.

        `config` is an instance of `Config`. Raises UserError if the data set does not suit the domain, or if a file or
        package that `config` requires is missing.
        """
        ...

    @staticmethod
    def templates(root: Path, manifest: Manifest, split: str, num: int) -> Tensor | None:
        """Templates (N, L) int64 with prompts and mask tokens, N <= num; None if samples start fully masked."""
        ...

    def measure(self, drawn: GeneratedSamples) -> Measured:
        """Compute all metrics."""
        ...

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        """Draw the first samples as a PNG.

        `rows` are samples as `scmdm sample out=NAME.jsonl` writes them. Returns the caption, or None if the domain has
        no such figure.
        """
        ...

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        """Draw distributions of several sets of samples as a PNG; the first set is held-out data.

        Returns the caption, or None if there is nothing to draw.
        """
        ...


@runtime_checkable
class ScoringDomain(Protocol):
    """A domain that scores each sample by itself, with a large model: work that the ranks of an evaluation share.

    `Domain.measure` then finds the scores of all samples in `GeneratedSamples.scores`.
    """

    def scores(self, drawn: GeneratedSamples) -> dict[str, np.ndarray]:
        """Return arrays with one row for each sample."""
        ...


class WithoutPrompts:
    """Mixin for domains whose samples start fully masked."""

    @staticmethod
    def templates(root: Path, manifest: Manifest, split: str, num: int) -> Tensor | None:
        return None


class WithoutFigures:
    """Mixin for domains without figures."""

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        return None

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        return None


def decode_split(root: Path, manifest: Manifest, split: str) -> list[str]:
    """Decode all sequences of a split."""
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    rows = read_split(root, split).tolist()
    if manifest.framing == "concatenate":
        return [block_text(row, tokenizer) for row in rows]
    return [tokenizer.decode(row) for row in rows]
