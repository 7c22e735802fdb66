"""Quality of codes of a discrete autoencoder: which are used, and which are neighbours, against held-out samples.

What the codes look like only the user's own decoder knows; nothing of it is loaded here. Two finite sets of the same
source differ, too, so that each distance is given beside its floor: that of as many training samples.

Legend: N samples, H rows, W codes of a row, K codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import LevelTokenizer, load_tokenizer
from scmdm.domains.interface import Asked, GeneratedSamples, Metric, Undrawn, Unprompted, refuse
from scmdm.domains.jensen_shannon import JensenShannon

Counts = tuple[np.ndarray, np.ndarray]  # outcomes, ascending, and how often each was seen


@dataclass(frozen=True)
class CodeMetrics:
    """Of the framed samples; None where there are none."""

    num_samples: int
    num_framed: int  # [BOS] and nothing but codes
    usage_distance: float | None  # Jensen-Shannon distance of the frequencies of codes
    usage_distance_floor: float | None
    pair_distance: float | None  # of pairs of neighbours, beside and below each other
    pair_distance_floor: float | None
    codebook_used: float  # part of the codebook that the samples use
    codebook_used_floor: float  # that as many training samples use
    num_copies: int  # of training samples

    def as_dict(self) -> dict[str, Any]:
        """Everything, the ratios too."""
        count = max(1, self.num_samples)
        return {**asdict(self), "framed": self.num_framed / count, "copies": self.num_copies / count}


@dataclass(frozen=True)
class CodeReference:
    """What samples are compared with; make it once for many evaluations."""

    train_NHW: np.ndarray
    usage: Counts  # of held-out samples
    pairs: Counts
    codebook: int

    @classmethod
    def make(cls, train_NHW: np.ndarray, held_out_NHW: np.ndarray, codebook: int) -> CodeReference:
        return cls(train_NHW, usage(held_out_NHW), pairs(held_out_NHW, codebook), codebook)

    def distances(self, codes_NHW: np.ndarray) -> tuple[float | None, float | None]:
        """Of the use of codes, and of pairs."""
        return distance(usage(codes_NHW), self.usage), distance(pairs(codes_NHW, self.codebook), self.pairs)


def usage(codes_NHW: np.ndarray) -> Counts:
    """How often each code occurs."""
    return np.unique(codes_NHW, return_counts=True)


def pairs(codes_NHW: np.ndarray, codebook: int) -> Counts:
    """How often each pair of neighbours occurs, as `2 (left K + right)`, of those below each other one more."""
    codes_NHW = codes_NHW.astype(np.int64)
    beside = (codes_NHW[:, :, :-1] * codebook + codes_NHW[:, :, 1:]).ravel() * 2
    below = (codes_NHW[:, :-1] * codebook + codes_NHW[:, 1:]).ravel() * 2 + 1
    return np.unique(np.concatenate([beside, below]), return_counts=True)


def distance(a: Counts, b: Counts) -> float | None:
    """Jensen-Shannon distance of two sets of counts, with natural logarithms; None where one is empty."""
    outcomes_K = np.union1d(a[0], b[0])
    p_K, q_K = np.zeros(len(outcomes_K)), np.zeros(len(outcomes_K))
    p_K[np.searchsorted(outcomes_K, a[0])] = a[1]
    q_K[np.searchsorted(outcomes_K, b[0])] = b[1]
    found = JensenShannon.between(p_K, q_K)
    return None if found is None else found.distance


def evaluate_codes(codes_NHW: np.ndarray, framed: Sequence[bool], reference: CodeReference) -> CodeMetrics:
    """All metrics of samples, of which those that are not `framed` are left out."""
    train_NHW, whole_NHW = reference.train_NHW, codes_NHW[np.asarray(framed, bool)]
    chosen = np.linspace(0, len(train_NHW) - 1, min(len(whole_NHW), len(train_NHW)), dtype=np.int64)
    real_NHW = train_NHW[chosen]
    known = {row.tobytes() for row in train_NHW.astype(np.int64)}
    (own_usage, own_pairs), (floor_usage, floor_pairs) = (reference.distances(x) for x in (whole_NHW, real_NHW))
    return CodeMetrics(
        num_samples=len(codes_NHW),
        num_framed=len(whole_NHW),
        usage_distance=own_usage,
        usage_distance_floor=floor_usage,
        pair_distance=own_pairs,
        pair_distance_floor=floor_pairs,
        codebook_used=len(np.unique(whole_NHW)) / reference.codebook,
        codebook_used_floor=len(np.unique(real_NHW)) / reference.codebook,
        num_copies=sum(row.tobytes() in known for row in whole_NHW.astype(np.int64)),
    )


class Codes(Unprompted, Undrawn):
    """Codes of a VQ model, or of another discrete autoencoder."""

    name: ClassVar[str] = "codes"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("pair_distance", "Jensen-Shannon distance of neighbouring codes", "lower", 1, 4),
        Metric("pair_distance_floor", "the same of as many training samples", "", 1, 4, in_figure=False),
        Metric("usage_distance", "Jensen-Shannon distance of the use of codes", "lower", 1, 4),
        Metric("usage_distance_floor", "the same of as many training samples", "", 1, 4, in_figure=False),
        Metric("codebook_used", "codebook in use, %", "", 100, 1),
        Metric("codebook_used_floor", "the same of as many training samples", "", 100, 1, in_figure=False),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
        Metric("copies", "copies of training samples, %", "lower", 100, 2, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        refuse(self.name, asked, "fcd", "moses", "scorer", "mauve", "inception")
        tokenizer = load_tokenizer(root / manifest.tokenizer.file)
        assert isinstance(tokenizer, LevelTokenizer)
        self._tokenizer = tokenizer
        train, held_out = (tokenizer.codes(read_split(root, split)) for split in ("train", asked.split))
        self._reference = CodeReference.make(train, held_out, tokenizer.layout.levels)

    def measure(self, drawn: GeneratedSamples) -> dict[str, Any]:
        return evaluate_codes(self._tokenizer.codes(drawn.tokens.numpy()), drawn.framed, self._reference).as_dict()
