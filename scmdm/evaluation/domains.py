"""What models make - molecules, text ... - and how each is measured, compared and shown.

A domain follows from the tokenizer of a data set. Evaluation, study and report know no domain, only this interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from scmdm.data.loader import read_split
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.errors import UserError
from scmdm.evaluation.molecules import FCD_MOLECULES, Reference, draw_grid, evaluate_molecules
from scmdm.evaluation.text import check_scorer, evaluate_text
from scmdm.sampling import Generated


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


@dataclass(frozen=True)
class Asked:
    """What an evaluation asks of a domain."""

    split: str = "test"  # what samples are compared with
    fcd: bool = False  # molecules
    scorer: str | None = None  # text: directory of a transformers causal model
    device: str = "cpu"


class Domain(Protocol):
    """Made once for many evaluations of the same data set; the metrics' first is what models are compared by."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        """Read what samples are compared with. Raises UserError for what does not go together."""
        ...

    def measure(self, drawn: Generated) -> dict[str, Any]:
        """Numbers by name (None: not to be had), and what else is to be kept, as JSON has it."""
        ...

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        """Draw the first samples, not chosen, as a PNG; returns the caption, or None where there is nothing to draw."""
        ...


class Molecules:
    """SMILES and SELFIES."""

    name: ClassVar[str] = "molecules"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("validity", "valid, % of samples", "higher", 100, 1, " % valid"),
        Metric("uniqueness_of_samples", "valid and unique, % of samples", "higher", 100, 1),
        Metric("novelty_of_samples", "valid, unique and novel, % of samples", "higher", 100, 1),
        Metric("novelty_of_unique", "novel, % of unique", "higher", 100, 1),
        Metric("fcd", f"Fréchet ChemNet distance of {FCD_MOLECULES} valid", "lower", 1, 2),
        Metric("property_distance", "property distance, std", "lower", 1, 3),
        # Valid if all behind the first end mark is ignored, however malformed.
        Metric("parsed", "parsed, % of samples", "higher", 100, 1, in_figure=False),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        if asked.scorer is not None:
            raise UserError(f"scorer={asked.scorer} is for text, and this model makes molecules; leave it out")
        train, held_out = (decode_split(root, manifest, split) for split in ("train", asked.split))
        self._reference = Reference.make(train, held_out, fcd=asked.fcd)

    def measure(self, drawn: Generated) -> dict[str, Any]:
        return evaluate_molecules(drawn.texts, drawn.framed, self._reference).as_dict()

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        drawn = draw_grid([row["text"] for row in rows if row["framed"]], path)
        return f"the first {drawn} valid molecules"


class Text:
    """Everything else."""

    name: ClassVar[str] = "text"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("perplexity", "generative perplexity", "lower", 1, 2),
        Metric("entropy", "entropy, nats", "", 1, 3),
        Metric("distinct_2", "distinct bigrams", "higher", 1, 3),
    )

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        if asked.fcd:
            raise UserError("fcd=true is for molecules, and this model makes text; leave it out")
        if asked.scorer is not None:
            check_scorer(Path(asked.scorer))
        self._asked, self._pad_id = asked, manifest.pad_id
        self._held_out = [] if asked.scorer is not None else decode_split(root, manifest, asked.split)

    def measure(self, drawn: Generated) -> dict[str, Any]:
        scorer = Path(self._asked.scorer) if self._asked.scorer is not None else None
        return evaluate_text(
            drawn.texts,
            drawn.tokens.numpy(),
            self._pad_id,
            held_out=self._held_out,
            scorer=scorer,
            device=self._asked.device,
        ).as_dict()

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        return None


DOMAINS: Mapping[str, type[Domain]] = {domain.name: domain for domain in (Molecules, Text)}
_OF_TOKENIZER = {"smiles": "molecules"}


def domain_name(tokenizer_kind: str) -> str:
    """The domain that a kind of tokenizer is for."""
    return _OF_TOKENIZER.get(tokenizer_kind, "text")


def domain_of(manifest: Manifest) -> type[Domain]:
    """The domain of a data set."""
    return DOMAINS[domain_name(manifest.tokenizer.kind)]


def decode_split(root: Path, manifest: Manifest, split: str) -> list[str]:
    """The texts of a split."""
    tokenizer = load_tokenizer(root / manifest.tokenizer.file)
    return [tokenizer.decode(row) for row in read_split(root, split).tolist()]
