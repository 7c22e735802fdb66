"""What models make - molecules, text ... - and how each is measured, compared and shown.

A domain follows from a data set's tokenizer, and from whether its samples have prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scmdm.data.loader import read_labels
from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import LevelTokenizer, Tokenizer
from scmdm.domains.codes.code_quality import Codes
from scmdm.domains.genomes.spectra import GenomeReference, Spectrum, evaluate_genomes
from scmdm.domains.images.image_quality import ImageReference, draw_pictures, evaluate_images
from scmdm.domains.interface import Asked, Domain, GeneratedSamples, Metric, Undrawn, Unprompted, decode_split, refuse
from scmdm.domains.molecules.moses_metrics import SAMPLES as MOSES_SAMPLES
from scmdm.domains.molecules.moses_metrics import TRAINING_SET, UNIQUE_AT, MosesReference, evaluate_moses
from scmdm.domains.molecules.quality import FCD_MOLECULES, Reference, draw_grid, evaluate_molecules, parse_molecule
from scmdm.domains.molecules.set_statistics import PROPERTIES, Work, properties_of
from scmdm.domains.responses.responses import Responses
from scmdm.domains.text.mauve_score import check_measures, mauve
from scmdm.domains.text.text_quality import NgramScorer, evaluate_text
from scmdm.evaluation.figures import distribution_figure, genome_figure
from scmdm.system.package_data import user_cache
from scmdm.system.worker_processes import core_count

MOSES_PROTOCOL = f"MOSES (its protocol: {MOSES_SAMPLES:,} samples; real data: its training set, as published)"


def _moses_metric(name: str, better: str = "higher", title: str = "", *, in_figure: bool = False) -> Metric:
    return Metric(
        f"moses_{name}",
        f"MOSES {title or name}",
        better,
        digits=4,
        in_figure=in_figure,
        protocol=MOSES_PROTOCOL,
        reference=TRAINING_SET.get(name),
        most=1 if better == "higher" else None,
    )


_MOSES_METRICS = (
    _moses_metric("valid"),
    *(_moses_metric(f"unique@{count}") for count in UNIQUE_AT),
    *(_moses_metric(f"FCD/{suffix}", "lower", in_figure=True) for suffix in ("Test", "TestSF")),
    *(
        _moses_metric(f"{name}/{suffix}", in_figure=True)
        for name in ("SNN", "Frag", "Scaf")
        for suffix in ("Test", "TestSF")
    ),
    _moses_metric("IntDiv", in_figure=True),
    _moses_metric("IntDiv2"),
    _moses_metric("Filters", in_figure=True),
    _moses_metric("Novelty", in_figure=True),
    *(_moses_metric(name, "lower", f"{name}, distance") for name in PROPERTIES),
)


class Molecules(Unprompted):
    """SMILES and SELFIES."""

    name: ClassVar[str] = "molecules"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("validity", "valid, % of samples", "higher", 100, 1, " % valid", most=1),
        Metric("uniqueness_of_samples", "valid and unique, % of samples", "higher", 100, 1, most=1),
        Metric("novelty_of_samples", "valid, unique and novel, % of samples", "higher", 100, 1, most=1),
        Metric("novelty_of_unique", "novel, % of unique", "higher", 100, 1, most=1),
        Metric("fcd", f"Fréchet ChemNet distance of {FCD_MOLECULES} valid", "lower", 1, 2),
        Metric("property_distance", "property distance, std", "lower", 1, 3),
        # Valid if all behind the first end mark is ignored, however malformed.
        Metric("parsed", "parsed, % of samples", "higher", 100, 1, in_figure=False),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
        *_MOSES_METRICS,
    )

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        refuse(self.name, asked, "scorer", "mauve", "inception")
        self._work = Work(core_count() if asked.alone else 1, asked.device, progress=asked.alone)
        first = Work(core_count(), asked.device, progress=True)
        self._moses = MosesReference.published(fcd=asked.fcd, work=first) if asked.moses else None
        train, held_out = (decode_split(root, manifest, split) for split in ("train", asked.split))
        self._reference = Reference.make(train, held_out, fcd=asked.fcd)

    def measure(self, drawn: GeneratedSamples) -> dict[str, Any]:
        found = evaluate_molecules(drawn.texts, drawn.framed, self._reference).as_dict()
        if self._moses is not None:
            table = evaluate_moses(drawn.texts, drawn.framed, self._moses, self._work).as_dict()
            found |= {f"moses_{name}": value for name, value in table.items()}
        return found

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        drawn = draw_grid([row["text"] for row in rows if row["framed"]], path)
        return f"the first {drawn} valid molecules"

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        parsed = {name: [parse_molecule(row["text"]) for row in rows if row["framed"]] for name, rows in sets.items()}
        valid = {name: [molecule for molecule in found if molecule is not None] for name, found in parsed.items()}
        if not all(valid.values()):
            return None
        distribution_figure({name: properties_of(found) for name, found in valid.items()}, path, units={"weight": "Da"})
        return "properties of the valid molecules (SA: synthetic accessibility)"


class Text(Unprompted, Undrawn):
    """Everything else."""

    name: ClassVar[str] = "text"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("perplexity", "generative perplexity", "lower", 1, 2),
        Metric("entropy", "entropy, nats", "", 1, 3),
        Metric("mauve", "MAUVE", "higher", 1, 3),
        Metric("distinct_1", "distinct words", "higher", 1, 3, in_figure=False),
        Metric("distinct_2", "distinct bigrams", "higher", 1, 3),
        Metric("distinct_3", "distinct trigrams", "higher", 1, 3, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        refuse(self.name, asked, "fcd", "moses", "inception")
        check_measures(asked.scorer, asked.mauve)
        # Blocks of concatenated texts have no padding, and its id may be that of the end mark.
        self._asked, self._pad_id = asked, -1 if manifest.framing == "concatenate" else manifest.pad_id
        needed = asked.mauve or asked.scorer is None
        self._held_out = decode_split(root, manifest, asked.split) if needed else []

    @cached_property
    def _scorer(self) -> Path | NgramScorer:
        asked = self._asked.scorer
        return Path(asked) if asked is not None else NgramScorer.fit(self._held_out, "held-out text")

    def measure(self, drawn: GeneratedSamples) -> dict[str, Any]:
        scorer, device = self._scorer, self._asked.device
        found = evaluate_text(drawn.texts, drawn.tokens.numpy(), self._pad_id, scorer, device=device).as_dict()
        if self._asked.mauve:
            assert isinstance(scorer, Path)
            references = self._held_out[: len(drawn.texts)]
            found["mauve"] = mauve(drawn.texts, references, scorer, device=device)
        return found


class Genomes(Unprompted, Undrawn):
    """Windows of DNA. The distances have a floor that falls with the number of samples: see docs/genomes.md."""

    name: ClassVar[str] = "genomes"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("js_distance_6", "Jensen-Shannon distance of 6-mers", "lower", 1, 4),
        Metric("js_distance_3", "Jensen-Shannon distance of 3-mers", "lower", 1, 4),
        Metric("js_divergence_6", "Jensen-Shannon divergence of 6-mers, nats", "lower", 1, 5, in_figure=False),
        Metric("js_divergence_3", "Jensen-Shannon divergence of 3-mers, nats", "lower", 1, 5, in_figure=False),
        Metric(
            "weighted_js_distance_6", "Jensen-Shannon distance of 6-mers by species", "lower", 1, 4, in_figure=False
        ),
        Metric(
            "weighted_js_distance_3", "Jensen-Shannon distance of 3-mers by species", "lower", 1, 4, in_figure=False
        ),
        Metric("gc_distance", "GC content, distance of distributions", "lower", 1, 4),
        Metric("gc_mean", "GC content", "", 1, 4, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        refuse(self.name, asked, "fcd", "moses", "scorer", "mauve", "inception")
        species = [manifest.labels[label] for label in read_labels(root, asked.split)] if manifest.labels else None
        self._reference = GenomeReference.make(decode_split(root, manifest, asked.split), species)

    def measure(self, drawn: GeneratedSamples) -> dict[str, Any]:
        return evaluate_genomes(drawn.texts, drawn.framed, self._reference, drawn.labels).as_dict()

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        spectra = {name: Spectrum.of([row["text"] for row in rows if row["framed"]]) for name, rows in sets.items()}
        held_out, *_ = spectra
        genome_figure(spectra.pop(held_out), spectra, path)
        return "GC content and 3-mers of the samples and of held-out windows"


class Images(Unprompted, Undrawn):
    """Pictures as levels. Without Inception's weights compared in the features of a classifier trained here."""

    name: ClassVar[str] = "images"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("frechet_classifier", "Fréchet distance in a classifier's features (not FID)", "lower", 1, 3),
        Metric("frechet_classifier_floor", "the same of as many training pictures", "", 1, 3, in_figure=False),
        Metric("class_distance", "distance of the distributions of classes", "lower", 1, 3),
        Metric("fid", "FID", "lower", 1, 2),
        Metric("inception_score", "Inception Score", "higher", 1, 2),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
        Metric("copies", "copies of training pictures, %", "lower", 100, 2, in_figure=False),
        Metric("memorised", "memorised, %", "lower", 100, 2, in_figure=False),
    )

    def __init__(self, root: Path, manifest: Manifest, asked: Asked) -> None:
        refuse(self.name, asked, "fcd", "moses", "scorer", "mauve")
        inception = Path(asked.inception) if asked.inception is not None else None
        work = user_cache("classifiers")
        work.mkdir(parents=True, exist_ok=True)
        self._reference = ImageReference.make(root, asked.split, work=work, inception=inception, device=asked.device)

    def measure(self, drawn: GeneratedSamples) -> dict[str, Any]:
        return evaluate_images(drawn.tokens.numpy(), self._reference).as_dict()

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        assert isinstance(tokenizer, LevelTokenizer)
        drawn = draw_pictures(tokenizer.pictures(np.array([row["tokens"] for row in rows])), path)
        return f"the first {drawn} samples"


DOMAINS: Mapping[str, type[Domain]] = {
    domain.name: domain for domain in (Molecules, Text, Responses, Genomes, Images, Codes)
}
_OF_TOKENIZER = {"smiles": "molecules", "selfies": "molecules", "dna": "genomes", "levels": "images", "codes": "codes"}


def domain_name(tokenizer_kind: str) -> str:
    """The domain that a kind of tokenizer is for."""
    return _OF_TOKENIZER.get(tokenizer_kind, "text")


def domain_of(manifest: Manifest) -> type[Domain]:
    """The domain of a data set."""
    return Responses if manifest.framing == "prompts" else DOMAINS[domain_name(manifest.tokenizer.kind)]
