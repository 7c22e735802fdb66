"""What evaluation, study and report know of a domain: this interface.

Legend: N samples, L length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import Tokenizer, block_text, load_tokenizer
from scmdm.errors import UserError


@dataclass(frozen=True)
class GeneratedSamples:
    """Samples in order, with what they cost."""

    tokens: Tensor  # (N, L) int64, on the CPU
    texts: list[str]  # up to the first end mark; of a model of concatenated texts all of them
    framed: list[bool]  # the marks are where the data has them; else `texts` holds a fragment
    counts: list[int]  # denoiser evaluations of each
    seconds: float
    labels: list[str] | None = None  # the class that each was drawn for

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations per sample; the most, when blocks of some prompts cost nothing."""
        return max(self.counts)


@dataclass(frozen=True)
class Metric:
    """A number of `Domain.measure`, and how it is shown."""

    name: str
    title: str
    better: str = ""  # "higher", "lower", or nothing that can be said of it alone
    scale: float = 1.0  # from the number to what is shown
    digits: int = 3
    unit: str = ""  # in sentences
    in_figure: bool = True
    protocol: str = ""  # of a published benchmark, which has a table and a figure of its own
    reference: float | None = None  # of real data, as `protocol` publishes it
    most: float | None = None  # that is possible

    def real(self) -> str:
        """The reference as it is shown, or nothing."""
        return "" if self.reference is None else f"{self.scale * self.reference:.{self.digits}f}"


@dataclass(frozen=True)
class Asked:
    """What an evaluation asks of a domain."""

    split: str = "test"  # what samples are compared with
    fcd: bool = False  # molecules: Frechet ChemNet distance
    moses: bool = False  # molecules: MOSES' metrics, against its published test sets
    scorer: str | None = None  # text: directory of a transformers causal model
    mauve: bool = False  # text: MAUVE in the scorer's features
    inception: str | None = None  # images: Inception's weights, for FID
    device: str = "cpu"
    alone: bool = False  # nothing else runs meanwhile: measure on all cores, and show how far it is


class Domain(Protocol):
    """Made once for many evaluations of the same data set; the metrics' first is what models are compared by."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        """Read what samples are compared with. Raises UserError for what does not go together."""
        ...

    @staticmethod
    def given(root: Path, manifest: Manifest, split: str, num: int) -> Tensor | None:
        """Templates (N, L) of what `num` samples, or fewer, are to begin with; None: they begin with nothing."""
        ...

    def measure(self, drawn: GeneratedSamples) -> dict[str, Any]:
        """Numbers by name (None: not to be had), and what else is to be kept, as JSON has it."""
        ...

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        """Draw the first samples, not chosen, as a PNG; returns the caption, or None where there is nothing to draw."""
        ...

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        """Draw how samples are distributed, the first set being held-out data; the caption, or None as in `draw`."""
        ...


class Unprompted:
    """Of a domain: samples begin with nothing."""

    @staticmethod
    def given(root: Path, manifest: Manifest, split: str, num: int) -> Tensor | None:
        return None


class Undrawn:
    """Of a domain: there is nothing to draw."""

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        return None

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        return None


def refuse(domain: str, asked: Asked, *keys: str) -> None:
    """UserError when something was asked for that belongs to another domain."""
    for key in keys:
        if value := getattr(asked, key):
            raise UserError(f"{key}={value} is not for {domain}, which this model makes; leave it out")


def decode_split(root: Path, manifest: Manifest, split: str) -> list[str]:
    """The texts of a split."""
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    rows = read_split(root, split).tolist()
    if manifest.framing == "concatenate":
        return [block_text(row, tokenizer) for row in rows]
    return [tokenizer.decode(row) for row in rows]
