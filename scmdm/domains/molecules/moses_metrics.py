"""MOSES' metrics of generated molecules (Polykovskiy et al., Front. Pharmacol. 2020, arXiv 1811.12823).

The protocol is 30,000 samples against the published sets `test` and `test_scaffolds`. Where the paper and the published
code differ, the metrics follow the code, which produced the published values.

Legend: N generated molecules, M molecules of a reference set, F bits of a fingerprint, W = F / 8 bytes.
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

from data_prep.moses import FILTER_FILES, moses_folder, read_smiles
from scmdm.distributed.engine import resolve_precision
from scmdm.domains.frechet import frechet_distance
from scmdm.domains.molecules.metrics import parse_molecule
from scmdm.domains.molecules.set_statistics import ComputeOptions, SetStatistics, describe, in_chunks
from scmdm.errors import UserError
from scmdm.system.package_data import user_cache
from scmdm.system.untrusted import read_bytes, reading

SAMPLES = 30_000  # of the published protocol
UNIQUE_AT = (1_000, 10_000)
# Published values of the whole training set: data/samples/train_metrics.csv of molecularsets/moses. It defines property
# distances differently and contains no novelty.
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
_ROWS, _COLUMNS = 512, 2048  # block of the similarity matrix
_EXACT_IN_BFLOAT16 = 256  # largest integer below which all integers are exact


@dataclass(frozen=True)
class MosesFilters:
    """SMARTS of unwanted groups: the medicinal chemistry filters (MCF) and PAINS."""

    smarts: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> MosesFilters:
        """Read `FILTER_FILES`. Raises UserError if a file is missing or contains invalid SMARTS."""
        medicinal, pains = (_read_table(folder / name) for name in FILTER_FILES)
        with reading(folder / FILTER_FILES[0], "table of MOSES", f"remove {folder} to download it again"):
            # The first file has a header; the second has SMARTS in the first column.
            column = medicinal[0].index("smarts")
            found = (*(row[column] for row in medicinal[1:]), *(row[0].strip() for row in pains))
        for smarts in found:
            if Chem.MolFromSmarts(smarts) is None:
                raise UserError(
                    f"{folder} contains {smarts!r}, which is not SMARTS; remove the folder to download it again"
                )
        return cls(found)

    def passes(self, molecule: Chem.Mol) -> bool:
        """True if a molecule has no unwanted group, charged atom, ring of 8 or more atoms, or element outside MOSES."""
        if any(len(ring) > _LARGEST_RING for ring in molecule.GetRingInfo().AtomRings()):
            return False
        if any(atom.GetFormalCharge() or atom.GetSymbol() not in _ALLOWED_ATOMS for atom in molecule.GetAtoms()):
            return False
        return not _catalog(self.smarts).HasMatch(Chem.AddHs(molecule))


def _read_table(path: Path) -> list[list[str]]:
    if not path.exists():
        raise UserError(f"{path} is missing; remove {path.parent} to download it again")
    with reading(path, "table of MOSES", f"remove {path.parent} to download it again"):
        text = read_bytes(path).decode()
        # Not strict: the published list of PAINS has spaces between a closing quote and the comma.
        rows = [row for row in csv.reader(text.splitlines(keepends=True)) if row]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of different numbers of columns")
        return rows


@lru_cache(maxsize=4)
def _catalog(smarts: tuple[str, ...]) -> FilterCatalog:
    catalog = FilterCatalog()
    for number, pattern in enumerate(smarts):
        catalog.AddEntry(FilterCatalogEntry(str(number), SmartsMatcher(str(number), Chem.MolFromSmarts(pattern))))
    return catalog


def cosine_similarity(a: Mapping[str, int], b: Mapping[str, int]) -> float | None:
    """Cosine similarity of two vectors of counts; None if one of them is zero."""
    norms = (math.sqrt(sum(count * count for count in counts.values())) for counts in (a, b))
    product = math.prod(norms)
    return sum(count * b.get(name, 0) for name, count in a.items()) / product if product else None


def nearest_similarity(sample_NW: np.ndarray, reference_MW: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Compute the Tanimoto similarity (N,) float32 of each fingerprint to the nearest one of the reference."""
    best_N = torch.zeros(len(sample_NW), device=device)
    for rows, similarity in _similarities(sample_NW, reference_MW, device):
        torch.maximum(best_N[rows], similarity.amax(1), out=best_N[rows])
    return best_N.cpu().numpy()


def internal_diversity(sample_NW: np.ndarray, device: str = "cpu") -> tuple[float, float]:
    """Compute the internal diversity IntDiv_p for p = 1 and p = 2, in [0, 1].

    It follows MOSES' code: `1 - mean_x (mean_y T(x, y)^p)^(1/p)` with Tanimoto similarity T, pairs (x, x) included. In
    the paper, the root is taken of the mean over all pairs.
    """
    sums_N2 = torch.zeros(len(sample_NW), 2, dtype=torch.float64, device=device)
    for rows, similarity in _similarities(sample_NW, sample_NW, device):
        sums_N2[rows] += torch.stack([similarity.sum(1), similarity.square().sum(1)], 1)
    means_N2 = sums_N2 / len(sample_NW)
    return float(1 - means_N2[:, 0].mean()), float(1 - means_N2[:, 1].sqrt().mean())


def _similarities(a_NW: np.ndarray, b_MW: np.ndarray, device: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of the Tanimoto similarity matrix with their rows; two empty fingerprints have similarity 1."""
    bits = max(int(np.bitwise_count(packed).sum(1).max(initial=0)) for packed in (a_NW, b_MW))
    dtype = resolve_precision("auto", torch.device(device)) if bits <= _EXACT_IN_BFLOAT16 else torch.float32
    for start in range(0, len(a_NW), _ROWS):
        a_NF = _unpack(a_NW[start : start + _ROWS], device, dtype)
        for at in range(0, len(b_MW), _COLUMNS):
            b_MF = _unpack(b_MW[at : at + _COLUMNS], device, dtype)
            common_NM = (a_NF @ b_MF.T).float()
            union_NM = (a_NF.float().sum(1)[:, None] + b_MF.float().sum(1)).sub_(common_NM)
            yield slice(start, start + _ROWS), common_NM.div_(union_NM).nan_to_num_(1.0)


def _unpack(packed_NW: np.ndarray, device: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed_NW, axis=1)).to(device).to(dtype)


def compare_sets(
    found: SetStatistics | None, reference: SetStatistics | None, device: str = "cpu"
) -> dict[str, float | None]:
    """Compare valid molecules with a reference set, with similarities computed on `device`.

    FCD (biased upwards for small sets), SNN (mean similarity to the nearest molecule of the reference), and the cosine
    similarities Frag and Scaf of the counts of fragments and scaffolds. None where something for it is missing.
    """
    if found is None or reference is None:
        return dict.fromkeys(("FCD", "SNN", "Frag", "Scaf"))
    a, b = found.activations, reference.activations
    return {
        "FCD": frechet_distance(a, b) if a is not None and b is not None else None,
        "SNN": float(nearest_similarity(found.fingerprints_NW, reference.fingerprints_NW, device).mean()),
        "Frag": cosine_similarity(found.fragments, reference.fragments),
        "Scaf": cosine_similarity(found.scaffolds, reference.scaffolds),
    }


@dataclass(frozen=True)
class MosesReference:
    """Training and test sets. Make it once for many evaluations."""

    train: frozenset[str]
    test: SetStatistics
    test_scaffolds: SetStatistics | None
    filters: MosesFilters | None

    @property
    def fcd(self) -> bool:
        """True if the FCD can be computed."""
        return self.test.activations is not None

    @classmethod
    def make(
        cls,
        train: Sequence[str],
        test: Sequence[str],
        test_scaffolds: Sequence[str] | None = None,
        filters: MosesFilters | None = None,
        *,
        fcd: bool,
        compute: ComputeOptions | None = None,
    ) -> MosesReference:
        """Make a reference of any data set, given as canonical SMILES."""
        others = None if test_scaffolds is None else describe(test_scaffolds, compute, fcd=fcd)
        return cls(frozenset(train), describe(test, compute, fcd=fcd), others, filters)

    @classmethod
    def published(cls, *, fcd: bool, compute: ComputeOptions | None = None) -> MosesReference:
        """Make the reference of the benchmark from the package molsets.

        Statistics of the test sets are cached in the user's cache directory. Raises UserError if the package cannot be
        downloaded.
        """
        filters = MosesFilters.read(moses_folder())
        cached = replace(compute or ComputeOptions(), cache=cache_folder())
        train, test, test_scaffolds = (read_smiles(split) for split in ("train", "test", "test_scaffolds"))
        return cls.make(train, test, test_scaffolds, filters, fcd=fcd, compute=cached)


def cache_folder() -> Path:
    """Directory with the statistics of the published sets."""
    return user_cache("moses")


@dataclass(frozen=True)
class MosesResult:
    """Metrics under the names of MOSES: of all samples (`valid`) or of valid molecules. None: not computed."""

    metrics: dict[str, Any]
    smiles: list[str]  # canonical SMILES of the valid molecules, duplicates included


def evaluate_moses(
    smiles: Sequence[str],
    framed: Sequence[bool],
    reference: MosesReference,
    compute: ComputeOptions | None = None,
    *,
    detailed: int | None = None,
) -> MosesResult:
    """Compute all metrics of generated SMILES.

    A sample is valid if it is `framed`, not empty, and RDKit parses it. `unique@k` is the fraction of distinct
    molecules among the first k valid ones, `Novelty` of the distinct ones that are not in the training set; properties
    are 1-Wasserstein distances from the test set. With fewer than two valid molecules only the counts are computed.
    SNN, IntDiv, Filters and the properties use the first `detailed` valid molecules (None: all): they cost N x M and,
    being means, change little with more molecules.
    """
    compute = compute or ComputeOptions()
    texts = [text if ok else "" for text, ok in zip(smiles, framed, strict=True)]
    read = [text for chunk in in_chunks("molecules read", _canonicals, texts, compute) for text in chunk]
    valid = [text for text in read if text is not None]
    found = describe(valid, compute, fcd=reference.fcd, detailed=detailed) if len(valid) > 1 else None
    filters, distinct = reference.filters, set(valid)
    diversity = (None, None) if found is None else internal_diversity(found.fingerprints_NW, compute.device)
    metrics = {
        "num_samples": len(smiles),
        "num_valid": len(valid),
        "valid": len(valid) / len(smiles) if smiles else 0.0,
        **{f"unique@{k}": len(set(valid[:k])) / k if len(valid) >= k else None for k in UNIQUE_AT},
        **{
            f"{name}/{suffix}": value
            for suffix, other in (("Test", reference.test), ("TestSF", reference.test_scaffolds))
            for name, value in compare_sets(found, other, compute.device).items()
        },
        "IntDiv": diversity[0],
        "IntDiv2": diversity[1],
        "Filters": filter_rate(valid[:detailed], filters, compute) if found is not None and filters else None,
        **{
            name: None if found is None else float(wasserstein_distance(found.properties[name], values_M))
            for name, values_M in reference.test.properties.items()
        },
        "Novelty": len(distinct - reference.train) / len(distinct) if distinct else None,
    }
    return MosesResult(metrics, valid)


def _canonicals(smiles: Sequence[str]) -> list[str | None]:
    """Canonicalise SMILES; None for an invalid SMILES, or one whose canonical form RDKit cannot parse."""
    found: list[str | None] = []
    for text in smiles:
        molecule = parse_molecule(text)
        canonical = "" if molecule is None else Chem.MolToSmiles(molecule)
        found.append(canonical if parse_molecule(canonical) is not None else None)
    return found


def filter_rate(smiles: Sequence[str], filters: MosesFilters, compute: ComputeOptions | None = None) -> float:
    """Fraction of the molecules (at least one) that pass the filters."""
    counts = in_chunks("molecules filtered", partial(_count_passing, filters), smiles, compute or ComputeOptions())
    return sum(counts) / len(smiles)


def _count_passing(filters: MosesFilters, smiles: Sequence[str]) -> int:
    return sum(filters.passes(Chem.MolFromSmiles(text)) for text in smiles)
