"""MOSES' metrics of generated molecules (Polykovskiy et al., Front. Pharmacol. 2020, arXiv 1811.12823).

The protocol is 30,000 samples against the published sets `test` and `test_scaffolds`. Where the paper and the published
code differ, the code's definition is taken, because the published figures come from it.

Legend: N generated molecules, M molecules of a reference set, F bits of a fingerprint, W bytes that hold them, A
activations of ChemNet.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rdkit import Chem
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogEntry, SmartsMatcher
from scipy.stats import wasserstein_distance
from torch import Tensor

from scmdm.distributed.engine import resolve_precision
from scmdm.domains.frechet import frechet_distance
from scmdm.domains.molecules.quality import parse_molecule
from scmdm.domains.molecules.set_statistics import PROPERTIES, SetStatistics, Work, describe, in_chunks
from scmdm.errors import UserError
from scmdm.system.package_data import user_cache

SAMPLES = 30_000  # of the protocol
UNIQUE_AT = (1_000, 10_000)
FILTER_FILES = ("mcf.csv", "wehi_pains.csv")  # as the package molsets ships them
# MOSES' own figures of its whole training set: data/samples/train_metrics.csv of molecularsets/moses. Its property
# distances are others than ours, and a novelty is not in it.
TRAINING_SET: Mapping[str, float] = {
    "valid": 1.0,
    "unique@1000": 1.0,
    "unique@10000": 1.0,
    "FCD/Test": 0.007976,
    "FCD/TestSF": 0.475534,
    "SNN/Test": 0.641916,
    "SNN/TestSF": 0.585871,
    "Frag/Test": 0.999983,
    "Frag/TestSF": 0.998599,
    "Scaf/Test": 0.990743,
    "Scaf/TestSF": 0.0,
    "IntDiv": 0.856676,
    "IntDiv2": 0.850754,
    "Filters": 1.0,
}
_ALLOWED_ATOMS = frozenset({"C", "N", "S", "O", "F", "Cl", "Br", "H"})
_LARGEST_RING = 7
_ROWS, _COLUMNS = 512, 2048  # of a block of similarities
_EXACT = 256


@dataclass(frozen=True)
class Filters:
    """Groups that a molecule of MOSES must not have, as SMARTS: the medicinal chemistry filters and PAINS."""

    smarts: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Filters:
        """From `FILTER_FILES`. Raises UserError for a file that is missing or holds no SMARTS."""
        medicinal, pains = (_read_table(folder / name) for name in FILTER_FILES)
        # The first has a header; the second names its filters in the last column.
        column = medicinal[0].index("smarts")
        found = (*(row[column] for row in medicinal[1:]), *(row[0].strip() for row in pains))
        for smarts in found:
            if Chem.MolFromSmarts(smarts) is None:
                raise UserError(
                    f"{folder} holds {smarts!r}, which is not SMARTS; remove the folder: it is fetched again"
                )
        return cls(found)

    def passes(self, molecule: Chem.Mol) -> bool:
        """Whether it has none of the groups, no charge, no ring of eight or more, and no other atoms than MOSES has."""
        if any(len(ring) > _LARGEST_RING for ring in molecule.GetRingInfo().AtomRings()):
            return False
        if any(atom.GetFormalCharge() or atom.GetSymbol() not in _ALLOWED_ATOMS for atom in molecule.GetAtoms()):
            return False
        return not _catalog(self.smarts).HasMatch(Chem.AddHs(molecule))


def _read_table(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="") as file:
            return [row for row in csv.reader(file) if row]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; remove {path.parent}, and it will be fetched again") from error


@lru_cache(maxsize=4)
def _catalog(smarts: tuple[str, ...]) -> FilterCatalog:
    catalog = FilterCatalog()
    for number, pattern in enumerate(smarts):
        catalog.AddEntry(FilterCatalogEntry(str(number), SmartsMatcher(str(number), Chem.MolFromSmarts(pattern))))
    return catalog


def cosine_similarity(a: Mapping[str, int], b: Mapping[str, int]) -> float | None:
    """Of two vectors of counts; None when one of them is zero."""
    norms = (math.sqrt(sum(count * count for count in counts.values())) for counts in (a, b))
    product = math.prod(norms)
    return sum(count * b.get(name, 0) for name, count in a.items()) / product if product else None


def nearest_similarity(sample_NW: np.ndarray, reference_MW: np.ndarray, device: str = "cpu") -> np.ndarray:
    """The Tanimoto similarity of each fingerprint to the nearest of the reference, (N,) float32."""
    best_N = torch.zeros(len(sample_NW), device=device)
    for rows, similarity in _similarities(sample_NW, reference_MW, device):
        torch.maximum(best_N[rows], similarity.amax(1), out=best_N[rows])
    return best_N.cpu().numpy()


def internal_diversity(sample_NW: np.ndarray, device: str = "cpu") -> tuple[float, float]:
    """IntDiv_p for p = 1 and 2, pairs with itself included, in [0, 1].

    As MOSES' code has it: one less the mean over molecules of `(mean_y T(x, y)^p)^(1/p)`, T Tanimoto similarity; in the
    paper the root is of the mean over all pairs.
    """
    sums_N2 = torch.zeros(len(sample_NW), 2, dtype=torch.float64, device=device)
    for rows, similarity in _similarities(sample_NW, sample_NW, device):
        sums_N2[rows] += torch.stack([similarity.sum(1), similarity.square().sum(1)], 1)
    means_N2 = sums_N2 / len(sample_NW)
    return float(1 - means_N2[:, 0].mean()), float(1 - means_N2[:, 1].sqrt().mean())


def _similarities(a_NW: np.ndarray, b_MW: np.ndarray, device: str) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the first set and their Tanimoto similarities, (rows, some of M); two empty fingerprints are equal."""
    most = max(int(np.bitwise_count(packed).sum(1).max(initial=0)) for packed in (a_NW, b_MW))
    # Products of zeros and ones are exact in bfloat16 up to 256.
    dtype = resolve_precision("auto", torch.device(device)) if most <= _EXACT else torch.float32
    for start in range(0, len(a_NW), _ROWS):
        a_NF = _unpack(a_NW[start : start + _ROWS], device, dtype)
        for at in range(0, len(b_MW), _COLUMNS):
            b_MF = _unpack(b_MW[at : at + _COLUMNS], device, dtype)
            common_NM = (a_NF @ b_MF.T).float()
            either_NM = (a_NF.float().sum(1)[:, None] + b_MF.float().sum(1)).sub_(common_NM)
            yield slice(start, start + _ROWS), common_NM.div_(either_NM).nan_to_num_(1.0)


def _unpack(packed_NW: np.ndarray, device: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed_NW, axis=1)).to(device).to(dtype)


@dataclass(frozen=True)
class Comparison:
    """Of the valid molecules with one reference set."""

    fcd: float | None  # the lower the better; biased upwards for few molecules; None: not asked for
    snn: float  # mean similarity to the nearest molecule of the reference
    frag: float | None  # cosine similarity of fragment counts; None: nothing to count
    scaf: float | None  # of scaffold counts

    @classmethod
    def of(cls, found: SetStatistics, reference: SetStatistics, work: Work | None = None) -> Comparison:
        """The similarities are shown and made as `work` says."""
        a, b = found.activations, reference.activations
        return cls(
            frechet_distance(a, b) if a is not None and b is not None and a.count > 1 else None,
            float(nearest_similarity(found.fingerprints_NW, reference.fingerprints_NW, (work or Work()).device).mean()),
            cosine_similarity(found.fragments, reference.fragments),
            cosine_similarity(found.scaffolds, reference.scaffolds),
        )


@dataclass(frozen=True)
class MosesReference:
    """What samples are compared with; make it once for many evaluations."""

    train: frozenset[str]
    test: SetStatistics
    test_scaffolds: SetStatistics | None
    filters: Filters | None

    @property
    def fcd(self) -> bool:
        """Whether the FCD is known."""
        return self.test.activations is not None

    @classmethod
    def make(
        cls,
        train: Sequence[str],
        test: Sequence[str],
        test_scaffolds: Sequence[str] | None = None,
        filters: Filters | None = None,
        *,
        fcd: bool,
        work: Work | None = None,
    ) -> MosesReference:
        """Of any data set, its SMILES canonical."""
        others = None if test_scaffolds is None else describe(test_scaffolds, work, fcd=fcd)
        return cls(frozenset(train), describe(test, work, fcd=fcd), others, filters)

    @classmethod
    def published(cls, *, fcd: bool, work: Work | None = None) -> MosesReference:
        """The benchmark's own, from the package molsets; statistics of the test sets are kept in the user's cache.

        Raises UserError when the package cannot be fetched.
        """
        from data_prep.moses import moses_folder, read_smiles

        filters, kept = Filters.read(moses_folder()), replace(work or Work(), cache=cache_folder())
        train, test, test_scaffolds = (read_smiles(split) for split in ("train", "test", "test_scaffolds"))
        return cls.make(train, test, test_scaffolds, filters, fcd=fcd, work=kept)


def cache_folder() -> Path:
    """Where the statistics of the published sets are kept."""
    return user_cache("moses")


@dataclass(frozen=True)
class MosesMetrics:
    """MOSES' table. All but `valid` is about the valid molecules, repetitions included; None: not known."""

    num_samples: int
    num_valid: int
    unique: dict[int, float | None]  # of the first so many valid ones; None where there are fewer
    novelty: float | None  # of the distinct ones, that are not in the training set
    filters: float | None  # that pass them
    int_div: float | None
    int_div_2: float | None
    test: Comparison | None
    test_scaffolds: Comparison | None
    property_distances: dict[str, float]  # 1-Wasserstein, in units of the property, from the test set
    properties: dict[str, np.ndarray]  # (N,) each, for figures
    smiles: list[str]  # canonical, of the valid molecules

    def as_dict(self) -> dict[str, Any]:
        """Under MOSES' names; without what there is of each molecule."""
        comparisons = {
            f"{label}/{suffix}": getattr(comparison, label.lower()) if comparison is not None else None
            for suffix, comparison in (("Test", self.test), ("TestSF", self.test_scaffolds))
            for label in ("FCD", "SNN", "Frag", "Scaf")
        }
        return {
            "num_samples": self.num_samples,
            "num_valid": self.num_valid,
            "valid": self.num_valid / self.num_samples if self.num_samples else 0.0,
            **{f"unique@{k}": value for k, value in self.unique.items()},
            **comparisons,
            "IntDiv": self.int_div,
            "IntDiv2": self.int_div_2,
            "Filters": self.filters,
            **{name: self.property_distances.get(name) for name in PROPERTIES},
            "Novelty": self.novelty,
        }


def evaluate_moses(
    smiles: Sequence[str],
    framed: Sequence[bool],
    reference: MosesReference,
    work: Work | None = None,
    *,
    detailed: int | None = None,
) -> MosesMetrics:
    """All metrics of generated SMILES.

    Valid: RDKit reads it, it is one string and not empty, and the sample is `framed` as the data is, a condition that
    MOSES' own models cannot fail. Of fewer than two valid molecules nothing but counts is known. SNN, IntDiv, Filters
    and the properties are those of the first `detailed` valid ones (None: all): means, which more molecules make no
    better in the third digit, at a cost of N x M.
    """
    work = work or Work()
    texts = [text if ok else "" for text, ok in zip(smiles, framed, strict=True)]
    read = [text for chunk in in_chunks("molecules read", _canonicals, texts, work) for text in chunk]
    valid = [text for text in read if text is not None]
    unique = {k: len(set(valid[:k])) / k if len(valid) >= k else None for k in UNIQUE_AT}
    novelty = len(set(valid) - reference.train) / len(set(valid)) if valid else None
    if len(valid) < 2:
        return MosesMetrics(len(smiles), len(valid), unique, novelty, None, None, None, None, None, {}, {}, valid)
    found = describe(valid, work, fcd=reference.fcd, detailed=detailed)
    others = reference.test_scaffolds
    return MosesMetrics(
        len(smiles),
        len(valid),
        unique,
        novelty,
        None if reference.filters is None else filter_rate(valid[:detailed], reference.filters, work),
        *internal_diversity(found.fingerprints_NW, work.device),
        Comparison.of(found, reference.test, work),
        None if others is None else Comparison.of(found, others, work),
        {
            name: float(wasserstein_distance(values_N, reference.test.properties[name]))
            for name, values_N in found.properties.items()
        },
        found.properties,
        valid,
    )


def _canonicals(smiles: Sequence[str]) -> list[str | None]:
    """None for what is no molecule, or one whose canonical spelling RDKit cannot read again."""
    found: list[str | None] = []
    for text in smiles:
        molecule = parse_molecule(text)
        canonical = "" if molecule is None else Chem.MolToSmiles(molecule)
        found.append(canonical if parse_molecule(canonical) is not None else None)
    return found


def filter_rate(smiles: Sequence[str], filters: Filters, work: Work | None = None) -> float:
    """The part of molecules, at least one, that pass the filters."""
    counts = in_chunks("molecules filtered", partial(_count_passing, filters), smiles, work or Work())
    return sum(counts) / len(smiles)


def _count_passing(filters: Filters, smiles: Sequence[str]) -> int:
    return sum(filters.passes(Chem.MolFromSmiles(text)) for text in smiles)
