"""What MOSES' metrics (Polykovskiy et al., Front. Pharmacol. 2020, arXiv 1811.12823) see of a set of molecules.

Where the paper and the published code differ, the code's definition is taken: the published figures come from it.

Legend: N generated molecules, M molecules of a reference set, F bits of a fingerprint, W bytes that hold them, A
activations of ChemNet.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem, rdBase
from rdkit.Chem import QED, AllChem, Crippen, Descriptors, rdFingerprintGenerator
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogEntry, SmartsMatcher
from rdkit.Chem.Scaffolds import MurckoScaffold
from rich.console import Console
from rich.progress import track
from torch import Tensor

from scmdm.errors import UserError
from scmdm.evaluation.frechet import Moments
from scmdm.evaluation.molecules import chemnet_activations, parse_molecule
from scmdm.files import atomic_write_bytes
from scmdm.workers import worker_processes

FILTER_FILES = ("mcf.csv", "wehi_pains.csv")  # as the package molsets ships them
_ALLOWED_ATOMS = frozenset({"C", "N", "S", "O", "F", "Cl", "Br", "H"})
_LARGEST_RING = 7
_SCAFFOLD_RINGS = 2  # fewer are no scaffold
_BITS, _RADIUS = 1024, 2
_CHUNK = 1024  # molecules that a worker describes at a time
_BLOCK = 4096  # rows of a block of similarities


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
    properties: dict[str, np.ndarray]  # (N,) each; none: not asked for
    activations: Moments | None  # of ChemNet; None: not asked for, or the package fcd is not installed

    @classmethod
    def join(cls, parts: Iterable[SetStatistics]) -> SetStatistics:
        """Of the union; one part after the other is taken, at least one."""
        rows: list[np.ndarray] = []
        values: dict[str, list[np.ndarray]] = {}
        fragments: Counter[str] = Counter()
        scaffolds: Counter[str] = Counter()
        moments: list[Moments] = []
        for part in parts:
            rows.append(part.fingerprints_NW)
            fragments.update(part.fragments)
            scaffolds.update(part.scaffolds)
            for name, found in part.properties.items():
                values.setdefault(name, []).append(found)
            if part.activations is not None:
                moments = [sum(moments, part.activations)]
        properties = {name: np.concatenate(found) for name, found in values.items()}
        return cls(np.concatenate(rows), fragments, scaffolds, properties, moments[0] if moments else None)

    def save(self, path: Path) -> None:
        """As an `.npz` of plain arrays."""
        arrays: dict[str, np.ndarray] = {"fingerprints": self.fingerprints_NW}
        for name, counter in (("fragments", self.fragments), ("scaffolds", self.scaffolds)):
            arrays[name] = np.array(list(counter), dtype=np.str_)
            arrays[f"{name}_count"] = np.array(list(counter.values()), dtype=np.int64)
        arrays |= {f"property_{name}": values_N for name, values_N in self.properties.items()}
        if self.activations is not None:
            arrays["activations"] = np.vstack([self.activations.products_FF, self.activations.sum_F])
            arrays["activations_count"] = np.array(self.activations.count)
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
            prefix = "property_"
            properties = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
            both, moments = arrays.get("activations"), None
            if both is not None:
                moments = Moments(int(arrays["activations_count"]), both[-1], both[:-1])
            return cls(arrays["fingerprints"], fragments, scaffolds, properties, moments)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, and it will be made again") from error


@dataclass(frozen=True)
class Wanted:
    """What to find out about molecules, and of how many of them."""

    fcd: bool
    properties: bool = True
    filters: Filters | None = None
    every: int = 1  # fingerprints, properties and filters, whose means need not all, of every so manyth sample


@dataclass(frozen=True)
class Examined:
    """Of samples, in their order."""

    canonical: list[str | None]  # None for what is no molecule, or one whose canonical spelling RDKit cannot read again
    statistics: SetStatistics  # of the valid ones
    filtered: int  # valid ones that the filters saw
    passed: int  # of those


def examine(samples: Sequence[str | None], wanted: Wanted, *, workers: int = 1, title: str | None = None) -> Examined:
    """Samples (SMILES, or None for one that does not count), at least one; the same with any number of worker
    processes, but for the rounding of ChemNet. A `title` is shown with a bar on a terminal.
    """
    starts = range(0, len(samples), _CHUNK)
    chunks = [samples[start : start + _CHUNK] for start in starts]
    with ExitStack() as stack:
        found: Iterable[Examined] = map(_examine, chunks, starts, repeat(wanted))
        if workers > 1:
            pool = stack.enter_context(worker_processes(workers))
            found = pool.map(_examine_in_worker, chunks, starts, repeat(wanted))
        shown = track(
            found, title or "", len(chunks), transient=True, disable=title is None or not Console().is_terminal
        )
        return _together(shown)


def _together(parts: Iterable[Examined]) -> Examined:
    canonical: list[str | None] = []
    counts = Counter[str]()

    def statistics() -> Iterator[SetStatistics]:
        for part in parts:
            canonical.extend(part.canonical)
            counts.update(filtered=part.filtered, passed=part.passed)
            yield part.statistics

    joined = SetStatistics.join(statistics())
    return Examined(canonical, joined, counts["filtered"], counts["passed"])


def _examine_in_worker(samples: Sequence[str | None], start: int, wanted: Wanted) -> Examined:
    torch.set_num_threads(1)  # of ChemNet: the other cores have workers of their own
    return _examine(samples, start, wanted)


def _examine(samples: Sequence[str | None], start: int, wanted: Wanted) -> Examined:
    with rdBase.BlockLogs():
        read = [None if text is None else _read(text) for text in samples]
        valid = [found for found in read if found is not None]
        some = [found[1] for at, found in enumerate(read, start) if found is not None and at % wanted.every == 0]
        molecules = [molecule for _, molecule in valid]
        activations = chemnet_activations([text for text, _ in valid]) if wanted.fcd and valid else None
        statistics = SetStatistics(
            fingerprints(some),
            Counter(fragment for molecule in molecules for fragment in fragments_of(molecule)),
            Counter(scaffold for molecule in molecules if (scaffold := scaffold_of(molecule)) is not None),
            properties_of(some) if wanted.properties else {},
            None if activations is None else Moments.of(activations),
        )
        seen = some if wanted.filters is not None else []
        passed = sum(wanted.filters.passes(molecule) for molecule in seen) if wanted.filters is not None else 0
    return Examined([None if found is None else found[0] for found in read], statistics, len(seen), passed)


def _read(text: str) -> tuple[str, Chem.Mol] | None:
    """Canonical spelling, and the molecule that it is."""
    molecule = parse_molecule(text)
    if molecule is None:
        return None
    canonical = Chem.MolToSmiles(molecule)
    again = parse_molecule(canonical)
    return None if again is None else (canonical, again)


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
