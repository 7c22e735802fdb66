"""The domain of molecules, as SMILES or SELFIES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from scmdm.data.manifest import Manifest
from scmdm.data.tokenizers import Tokenizer, load_tokenizer
from scmdm.domains.interface import (
    EvaluationSettings,
    GeneratedSamples,
    Measured,
    Metric,
    MetricKeys,
    WithoutPrompts,
    decode_split,
)
from scmdm.domains.molecules.config import MoleculeMetricKeys
from scmdm.domains.molecules.figures import molecule_grid
from scmdm.domains.molecules.metrics import (
    FCD_MOLECULES,
    MoleculeReference,
    compute_properties,
    measure_as_published,
    measure_molecules,
    parse_molecule,
)
from scmdm.domains.molecules.moses_metrics import SAMPLES as MOSES_SAMPLES
from scmdm.domains.molecules.moses_metrics import TRAINING_SET, UNIQUE_AT, MosesReference, evaluate_moses
from scmdm.domains.molecules.set_statistics import PROPERTIES, ComputeOptions
from scmdm.domains.plotting import distribution_figure
from scmdm.system.worker_processes import core_count

_PUBLISHED = "as published for QM9 (strings without special tokens)"
_MOSES = f"MOSES (protocol: {MOSES_SAMPLES:,} samples; real data: published values of its training set)"


def _moses_metric(name: str, better: str = "higher", title: str = "", *, in_figure: bool = False) -> Metric:
    return Metric(
        f"moses_{name}",
        f"MOSES {title or name}",
        better,
        digits=4,
        in_figure=in_figure,
        benchmark=_MOSES,
        reference=TRAINING_SET.get(name),
        maximum=1 if better == "higher" else None,
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
    *(_moses_metric(name, "lower", f"{name}, Wasserstein distance") for name in PROPERTIES),
)


def bare_texts(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[str]:
    """Decode whole samples without their special tokens, wherever they occur."""
    specials = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
    return [tokenizer.decode([id_ for id_ in row if id_ not in specials]) for row in rows]


class MoleculesDomain(WithoutPrompts):
    """Validity, uniqueness, novelty, property distributions, FCD and the metrics of MOSES."""

    name: ClassVar[str] = "molecules"
    Config: ClassVar[type[MetricKeys]] = MoleculeMetricKeys
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("validity", "valid, % of samples", "higher", 100, 1, " % valid", maximum=1),
        Metric("uniqueness_of_samples", "valid and unique, % of samples", "higher", 100, 1, maximum=1),
        Metric("novelty_of_samples", "valid, unique and novel, % of samples", "higher", 100, 1, maximum=1),
        Metric("novelty_of_unique", "novel, % of unique", "higher", 100, 1, maximum=1),
        Metric("fcd", f"Fréchet ChemNet distance of {FCD_MOLECULES} valid molecules", "lower", 1, 2),
        Metric("property_distance", "property distance, standard deviations", "lower", 1, 3, counted="num_valid"),
        Metric("published_validity", f"valid {_PUBLISHED}, % of samples", "higher", 100, 1, in_figure=False, maximum=1),
        Metric(
            "published_uniqueness", f"unique {_PUBLISHED}, % of valid", "higher", 100, 1, in_figure=False, maximum=1
        ),
        Metric("published_novelty", f"novel {_PUBLISHED}, % of valid", "higher", 100, 1, in_figure=False, maximum=1),
        Metric("parsed", "parsed up to the first [EOS], % of samples", "higher", 100, 1, in_figure=False),
        Metric("framed", "framed, % of samples", "higher", 100, 1, in_figure=False),
        *_MOSES_METRICS,
    )

    def __init__(
        self, root: Path, manifest: Manifest, config: MoleculeMetricKeys, settings: EvaluationSettings
    ) -> None:
        workers = core_count() if settings.exclusive else 1
        self._compute = ComputeOptions(workers, settings.device, progress=settings.exclusive)
        # Statistics of the published sets are computed once per machine, before any other job starts.
        first_use = ComputeOptions(core_count(), settings.device, progress=True)
        self._moses = MosesReference.published(fcd=config.fcd, compute=first_use) if config.moses else None
        train, held_out = (decode_split(root, manifest, split) for split in ("train", settings.split))
        others = (
            decode_split(root, manifest, name) for name in manifest.splits if name not in ("train", settings.split)
        )
        self._known = frozenset[str]().union(train, held_out, *others)
        self._tokenizer = load_tokenizer(root / manifest.tokenizer.file)
        self._reference = MoleculeReference.make(train, held_out, fcd=config.fcd)

    def measure(self, drawn: GeneratedSamples) -> Measured:
        bare = bare_texts(drawn.tokens.tolist(), self._tokenizer)
        own = measure_molecules(drawn.texts, drawn.framed, self._reference)
        published = measure_as_published(bare, self._known)
        found = own.metrics | published.metrics
        if self._moses is not None:
            table = evaluate_moses(drawn.texts, drawn.framed, self._moses, self._compute).metrics
            found |= {f"moses_{name}": value for name, value in table.items()}
        return Measured(found, own.values | published.values)

    @staticmethod
    def draw(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, path: Path) -> str | None:
        count = molecule_grid([row["text"] for row in rows if row["framed"]], path)
        return f"the first {count} valid molecules"

    @staticmethod
    def compare(sets: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> str | None:
        parsed = {name: [parse_molecule(row["text"]) for row in rows if row["framed"]] for name, rows in sets.items()}
        valid = {name: [molecule for molecule in found if molecule is not None] for name, found in parsed.items()}
        if not all(valid.values()):
            return None
        values = {name: compute_properties(found, PROPERTIES) for name, found in valid.items()}
        distribution_figure(values, path, units={"weight": "Da"})
        return "properties of the valid molecules (SA: synthetic accessibility)"
