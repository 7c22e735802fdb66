"""MOSES' metrics of generated molecules (Polykovskiy et al., Front. Pharmacol. 2020, arXiv 1811.12823).

The protocol is 30,000 samples against the published sets `test` and `test_scaffolds`. Where the paper and the published
code differ, the code's definition is taken, because the published figures come from it.

Legend: N generated molecules, M molecules of a reference set, F bits of a fingerprint, W bytes that hold them, A
activations of ChemNet.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rdkit
import torch
from rdkit import Chem, rdBase
from rdkit.Chem import QED, AllChem, Crippen, Descriptors, rdFingerprintGenerator
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogEntry, SmartsMatcher
from rdkit.Chem.Scaffolds import MurckoScaffold
from scipy.stats import wasserstein_distance
from torch import Tensor

from scmdm.errors import UserError
from scmdm.evaluation.frechet import Moments, frechet_distance
from scmdm.evaluation.molecules import chemnet_activations, parse_molecule
from scmdm.files import atomic_write_bytes
from scmdm.workers import worker_processes

SAMPLES = 30_000  # of the protocol
UNIQUE_AT = (1_000, 10_000)
FILTER_FILES = ("mcf.csv", "wehi_pains.csv")  # as the package molsets ships them
_ALLOWED_ATOMS = frozenset({"C", "N", "S", "O", "F", "Cl", "Br", "H"})
_LARGEST_RING = 7
_SCAFFOLD_RINGS = 2  # fewer are no scaffold
_BITS, _RADIUS = 1024, 2
_CHUNK = 1024  # molecules that a worker describes at a time
_BLOCK = 4096  # rows of a block of similarities
_CACHE_VERSION = 1


def synthetic_accessibility(molecule: Chem.Mol) -> float:
    """SA score, 1 (easy) to 10 (Ertl and Schuffenhauer, J. Cheminform. 2009), by RDKit's contributed code."""
    from rdkit.Contrib.SA_Score import sascorer

    return float(sascorer.calculateScore(molecule))


PROPERTIES: dict[str, Callable[[Chem.Mol], float]] = {
    "logP": Crippen.MolLogP,  # type: ignore[attr-defined]
    "SA": synthetic_accessibility,
    "QED": QED.qed,
    "weight": Descriptors.MolWt,  # type: ignore[attr-defined]
}


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


@dataclass(frozen=True)
class SetStatistics:
    """All that one set of molecules is compared by."""

    fingerprints_NW: np.ndarray  # Morgan, radius 2, 1024 bits packed into 128 bytes
    fragments: Counter[str]  # BRICS
    scaffolds: Counter[str]  # Bemis and Murcko's, of two rings or more
    properties: dict[str, np.ndarray]  # (N,) each
    activations: Moments | None  # of ChemNet; None: not asked for, or the package fcd is not installed

    @classmethod
    def join(cls, parts: Sequence[SetStatistics]) -> SetStatistics:
        """Of the union; `parts` must not be empty."""
        moments = [part.activations for part in parts]
        known = [found for found in moments if found is not None]
        return cls(
            np.concatenate([part.fingerprints_NW for part in parts]),
            sum((part.fragments for part in parts), Counter()),
            sum((part.scaffolds for part in parts), Counter()),
            {name: np.concatenate([part.properties[name] for part in parts]) for name in PROPERTIES},
            sum(known[1:], known[0]) if len(known) == len(moments) else None,
        )

    def save(self, path: Path) -> None:
        """As an `.npz` of plain arrays."""
        arrays: dict[str, np.ndarray] = {"fingerprints": self.fingerprints_NW}
        for name, counter in (("fragments", self.fragments), ("scaffolds", self.scaffolds)):
            arrays[name] = np.array(list(counter), dtype=np.str_)
            arrays[f"{name}_count"] = np.array(list(counter.values()), dtype=np.int64)
        arrays |= {f"property_{name}": values_N for name, values_N in self.properties.items()}
        if self.activations is not None:
            arrays["activations"] = np.vstack([self.activations.products_FF, self.activations.sum_F])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> SetStatistics:
        """What `save` wrote. Raises UserError when the file is damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            fragments, scaffolds = (
                Counter(dict(zip(arrays[name].tolist(), arrays[f"{name}_count"].tolist(), strict=True)))
                for name in ("fragments", "scaffolds")
            )
            properties = {name: arrays[f"property_{name}"] for name in PROPERTIES}
            found, both = arrays["fingerprints"], arrays.get("activations")
            moments = None if both is None else Moments(len(found), both[-1], both[:-1])
            return cls(found, fragments, scaffolds, properties, moments)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, and it will be made again") from error


def describe(smiles: Sequence[str], *, fcd: bool, workers: int = 1) -> SetStatistics:
    """Statistics of SMILES that RDKit can read, at least one; the same with any number of worker processes, but for the
    rounding of ChemNet.
    """
    chunks = [smiles[at : at + _CHUNK] for at in range(0, len(smiles), _CHUNK)]
    if workers == 1:
        return SetStatistics.join([_describe(chunk, fcd) for chunk in chunks])
    with worker_processes(workers) as pool:
        return SetStatistics.join(list(pool.map(_describe_in_worker, chunks, [fcd] * len(chunks))))


def _describe_in_worker(smiles: Sequence[str], fcd: bool) -> SetStatistics:
    torch.set_num_threads(1)  # of ChemNet: the other cores have workers of their own
    return _describe(smiles, fcd)


def _describe(smiles: Sequence[str], fcd: bool) -> SetStatistics:
    with rdBase.BlockLogs():
        molecules = [Chem.MolFromSmiles(text) for text in smiles]
        activations = chemnet_activations(smiles) if fcd else None
        return SetStatistics(
            fingerprints(molecules),
            Counter(fragment for molecule in molecules for fragment in fragments_of(molecule)),
            Counter(scaffold for molecule in molecules if (scaffold := scaffold_of(molecule)) is not None),
            properties_of(molecules),
            None if activations is None else Moments.of(activations),
        )


def properties_of(molecules: Sequence[Chem.Mol]) -> dict[str, np.ndarray]:
    """Each of `PROPERTIES` of each molecule, (N,) float64."""
    return {name: np.array([compute(molecule) for molecule in molecules]) for name, compute in PROPERTIES.items()}


def fingerprints(molecules: Sequence[Chem.Mol]) -> np.ndarray:
    """Morgan fingerprints of radius 2, 1024 bits packed into (N, 128) uint8."""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=_RADIUS, fpSize=_BITS)
    bits = [generator.GetFingerprintAsNumPy(molecule) for molecule in molecules]
    return np.packbits(np.array(bits, np.uint8).reshape(-1, _BITS), axis=1)


def fragments_of(molecule: Chem.Mol) -> list[str]:
    """SMILES of what BRICS' rules cut a molecule into (Degen et al., ChemMedChem 2008), repetitions included."""
    cut = AllChem.FragmentOnBRICSBonds(molecule)  # type: ignore[attr-defined]
    return Chem.MolToSmiles(cut).split(".")


def scaffold_of(molecule: Chem.Mol) -> str | None:
    """SMILES of Bemis and Murcko's scaffold (J. Med. Chem. 1996); None when it has fewer than two rings."""
    scaffold = MurckoScaffold.GetScaffoldForMol(molecule)
    return Chem.MolToSmiles(scaffold) if scaffold.GetRingInfo().NumRings() >= _SCAFFOLD_RINGS else None


def cosine_similarity(a: Mapping[str, int], b: Mapping[str, int]) -> float | None:
    """Of two vectors of counts; None when one of them is zero."""
    norms = (math.sqrt(sum(count * count for count in counts.values())) for counts in (a, b))
    product = math.prod(norms)
    return sum(count * b.get(name, 0) for name, count in a.items()) / product if product else None


def nearest_similarity(sample_NW: np.ndarray, reference_MW: np.ndarray, device: str = "cpu") -> np.ndarray:
    """The Tanimoto similarity of each fingerprint to the nearest of the reference, (N,) float32."""
    best_N = torch.zeros(len(sample_NW), device=device)
    for at, rows in _blocks(sample_NW, device):
        for _, others in _blocks(reference_MW, device):
            best = best_N[at : at + len(rows)]
            torch.maximum(best, _tanimoto(rows, others).amax(1), out=best)
    return best_N.cpu().numpy()


def internal_diversity(sample_NW: np.ndarray, device: str = "cpu") -> tuple[float, float]:
    """IntDiv_p for p = 1 and 2, pairs with itself included, in [0, 1].

    As MOSES' code has it: one less the mean over molecules of `(mean_y T(x, y)^p)^(1/p)`, T Tanimoto similarity; in the
    paper the root is of the mean over all pairs.
    """
    sums_N2 = torch.zeros(len(sample_NW), 2, dtype=torch.float64, device=device)
    for at, rows in _blocks(sample_NW, device):
        for _, others in _blocks(sample_NW, device):
            similarity = _tanimoto(rows, others)
            sums_N2[at : at + len(rows)] += torch.stack([similarity.sum(1), similarity.square().sum(1)], 1)
    means_N2 = sums_N2 / len(sample_NW)
    return float(1 - means_N2[:, 0].mean()), float(1 - means_N2[:, 1].sqrt().mean())


def _blocks(packed_NW: np.ndarray, device: str) -> Iterator[tuple[int, Tensor]]:
    for at in range(0, len(packed_NW), _BLOCK):
        yield at, torch.from_numpy(np.unpackbits(packed_NW[at : at + _BLOCK], axis=1)).to(device).float()


def _tanimoto(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """(N, M); two empty fingerprints are equal."""
    common_NM = a_NF @ b_MF.T
    either_NM = a_NF.sum(1)[:, None] + b_MF.sum(1) - common_NM
    return torch.where(either_NM > 0, common_NM / either_NM, 1.0)


@dataclass(frozen=True)
class Comparison:
    """Of the valid molecules with one reference set."""

    fcd: float | None  # the lower the better; biased upwards for few molecules; None: not asked for
    snn: float  # mean similarity to the nearest molecule of the reference
    frag: float | None  # cosine similarity of fragment counts; None: nothing to count
    scaf: float | None  # of scaffold counts

    @classmethod
    def of(cls, found: SetStatistics, reference: SetStatistics, device: str = "cpu") -> Comparison:
        a, b = found.activations, reference.activations
        return cls(
            frechet_distance(a, b) if a is not None and b is not None and a.count > 1 else None,
            float(nearest_similarity(found.fingerprints_NW, reference.fingerprints_NW, device).mean()),
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
        workers: int = 1,
    ) -> MosesReference:
        """Of any data set, its SMILES canonical."""
        others = None if test_scaffolds is None else describe(test_scaffolds, fcd=fcd, workers=workers)
        return cls(frozenset(train), describe(test, fcd=fcd, workers=workers), others, filters)

    @classmethod
    def published(cls, *, fcd: bool, workers: int = 1) -> MosesReference:
        """The benchmark's own, from the package molsets; statistics of the test sets are kept in the user's cache.

        Raises UserError when the package cannot be fetched.
        """
        from data_prep.moses import moses_folder, read_smiles

        folder = moses_folder()
        name = f"statistics-{_CACHE_VERSION}-rdkit-{rdkit.__version__}{'-fcd' if fcd else ''}"

        def statistics(split: str) -> SetStatistics:
            path = folder.parent / f"{folder.name}-{name}" / f"{split}.npz"
            if not path.is_file():
                describe(read_smiles(split), fcd=fcd, workers=workers).save(path)
            return SetStatistics.load(path)

        train = frozenset(read_smiles("train"))
        return cls(train, statistics("test"), statistics("test_scaffolds"), Filters.read(folder))


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

    def as_dict(self) -> dict[str, Any]:
        """Under MOSES' names; without the properties of each molecule."""
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
    *,
    workers: int = 1,
    device: str = "cpu",
) -> MosesMetrics:
    """All metrics of generated SMILES; `device` makes the similarities.

    Valid: RDKit reads it, it is one string and not empty, and the sample is `framed` as the data is, a condition that
    MOSES' own models cannot fail. Of fewer than two valid molecules nothing but counts is known.
    """
    read = [_canonical(text) if ok else None for text, ok in zip(smiles, framed, strict=True)]
    valid = [text for text in read if text is not None]
    unique = {k: len(set(valid[:k])) / k if len(valid) >= k else None for k in UNIQUE_AT}
    novelty = len(set(valid) - reference.train) / len(set(valid)) if valid else None
    if len(valid) < 2:
        return MosesMetrics(len(smiles), len(valid), unique, novelty, None, None, None, None, None, {}, {})
    found = describe(valid, fcd=reference.fcd, workers=workers)
    others = reference.test_scaffolds
    return MosesMetrics(
        len(smiles),
        len(valid),
        unique,
        novelty,
        None if reference.filters is None else filter_rate(valid, reference.filters, workers=workers),
        *internal_diversity(found.fingerprints_NW, device),
        Comparison.of(found, reference.test, device),
        None if others is None else Comparison.of(found, others, device),
        {
            name: float(wasserstein_distance(values_N, reference.test.properties[name]))
            for name, values_N in found.properties.items()
        },
        found.properties,
    )


def _canonical(text: str) -> str | None:
    """None for what is no molecule, or one whose canonical spelling RDKit cannot read again."""
    molecule = parse_molecule(text)
    canonical = "" if molecule is None else Chem.MolToSmiles(molecule)
    return canonical if parse_molecule(canonical) is not None else None


def filter_rate(smiles: Sequence[str], filters: Filters, *, workers: int = 1) -> float:
    """The part of molecules, at least one, that pass the filters."""
    chunks = [smiles[at : at + _CHUNK] for at in range(0, len(smiles), _CHUNK)]
    if workers == 1:
        passed = [_count_passing(chunk, filters) for chunk in chunks]
    else:
        with worker_processes(workers) as pool:
            passed = list(pool.map(_count_passing, chunks, [filters] * len(chunks)))
    return sum(passed) / len(smiles)


def _count_passing(smiles: Sequence[str], filters: Filters) -> int:
    return sum(filters.passes(Chem.MolFromSmiles(text)) for text in smiles)
