"""Statistics of large sets of molecules, computed in parallel and cached on disk.

Legend: N molecules, W bytes of a fingerprint, F features of ChemNet.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import rdkit
import torch
from rdkit import Chem, rdBase
from rdkit.Chem import QED, AllChem, Crippen, Descriptors, rdFingerprintGenerator
from rdkit.Chem.Scaffolds import MurckoScaffold

from scmdm.domains.frechet import Moments
from scmdm.domains.molecules.metrics import Property, chemnet_activations, compute_properties
from scmdm.observability.progress_bar import count_up
from scmdm.system.extras import installed_version
from scmdm.system.npz_files import read_npz, write_npz
from scmdm.system.package_data import optional
from scmdm.system.untrusted import reading
from scmdm.system.worker_processes import worker_processes

T = TypeVar("T")
_SCAFFOLD_RINGS = 2  # smaller scaffolds are ignored
_BITS, _RADIUS = 1024, 2
_CHUNK = 512  # molecules per job
_JOBS = 4  # minimum number of jobs per worker, because a worker takes seconds to start
_PART = 16_384  # molecules per cache file; an interruption loses at most one part
_VERSION = 2  # version of the cache files
_REMEDY = "remove it to compute it again"


def synthetic_accessibility(molecule: Chem.Mol) -> float:
    """SA score between 1 (easy) and 10 (Ertl and Schuffenhauer, J. Cheminform. 2009), from RDKit's contributed code."""
    from rdkit.Contrib.SA_Score import sascorer

    return float(sascorer.calculateScore(molecule))


PROPERTIES: dict[str, Property] = {
    "logP": Crippen.MolLogP,  # type: ignore[attr-defined]
    "SA": synthetic_accessibility,
    "QED": QED.qed,
    "weight": Descriptors.MolWt,  # type: ignore[attr-defined]
}
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SetStatistics:
    """Statistics of one set of molecules. Fingerprints and properties may cover only its first molecules."""

    fingerprints_NW: np.ndarray  # Morgan, radius 2, 1024 bits packed into 128 bytes
    fragments: Counter[str]  # BRICS
    scaffolds: Counter[str]  # Bemis-Murcko scaffolds with two rings or more
    properties: dict[str, np.ndarray]  # (N,) each
    activations: Moments | None = None  # of ChemNet; None if it was not run

    @classmethod
    def join(cls, parts: Sequence[SetStatistics]) -> SetStatistics:
        """Merge the statistics of parts (at least one), without activations."""
        fragments, scaffolds = Counter[str](), Counter[str]()
        for part in parts:
            fragments.update(part.fragments)
            scaffolds.update(part.scaffolds)
        return cls(
            np.concatenate([part.fingerprints_NW for part in parts]),
            fragments,
            scaffolds,
            {name: np.concatenate([part.properties[name] for part in parts]) for name in PROPERTIES},
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all fields but the activations as plain arrays."""
        arrays = {"fingerprints": self.fingerprints_NW}
        for name, counter in (("fragments", self.fragments), ("scaffolds", self.scaffolds)):
            arrays[name] = np.array(list(counter), dtype=np.str_)
            arrays[f"{name}_count"] = np.array(list(counter.values()), dtype=np.int64)
        return arrays | {f"property_{name}": values_N for name, values_N in self.properties.items()}

    @classmethod
    def of_arrays(cls, arrays: Arrays) -> SetStatistics:
        """Invert `arrays`. Raises KeyError or ValueError for malformed arrays."""
        fragments, scaffolds = (_counter(arrays, name) for name in ("fragments", "scaffolds"))
        prints_NW = _checked(arrays, "fingerprints", np.uint8, (None, _BITS // 8))
        shape = (len(prints_NW),)
        properties = {name: _checked(arrays, f"property_{name}", np.float64, shape) for name in PROPERTIES}
        return cls(prints_NW, fragments, scaffolds, properties)


@dataclass(frozen=True)
class ComputeOptions:
    """Resources of a computation. Results do not depend on them, except for rounding on a GPU."""

    workers: int = 1  # processes
    device: str = "cpu"  # for ChemNet and similarities
    cache: Path | None = None  # directory for finished parts, named by their content; None: no cache
    progress: bool = False  # show a progress bar


def describe(
    smiles: Sequence[str], compute: ComputeOptions | None = None, *, fcd: bool = False, detailed: int | None = None
) -> SetStatistics:
    """Compute the statistics of valid SMILES (at least one).

    Fingerprints and properties cover the first `detailed` molecules (None: all). The result does not depend on the
    number of workers. Raises UserError for a damaged cache file, or if `fcd` is set and the package is missing.
    """
    compute = compute or ComputeOptions()
    whole = len(smiles) if detailed is None else detailed
    name = f"molecules-{_VERSION}-rdkit-{rdkit.__version__}"
    task = _Task(
        name, "molecules described", _describe, SetStatistics.join, SetStatistics.arrays, SetStatistics.of_arrays
    )
    found = _run(task, smiles, whole, compute)
    if not fcd:
        return found
    optional("fcd", "the Frechet ChemNet distance", "molecules")
    # Several processes would compete for one GPU.
    chemnet = compute if compute.device == "cpu" else replace(compute, workers=1)
    network = _Task(
        f"chemnet-{_VERSION}-fcd-{installed_version('fcd')}",
        "molecules through ChemNet",
        partial(_moments, device=compute.device),
        lambda parts: sum(parts[1:], parts[0]),
        lambda moments: {"count": np.array(moments.count), "sum": moments.sum_F, "products": moments.products_FF},
        _moments_of_arrays,
    )
    return replace(found, activations=_run(network, smiles, len(smiles), chemnet))


def in_chunks(
    title: str, function: Callable[[Sequence[str]], T], smiles: Sequence[str], compute: ComputeOptions
) -> list[T]:
    """Apply a function to chunks of molecules, in parallel; returns the results in order."""
    chunks = [(smiles[at : at + _CHUNK],) for at in range(0, len(smiles), _CHUNK)]
    with _results(function, chunks, compute) as results, _count(title, len(smiles), compute) as step:
        found = []
        for (chunk,), result in zip(chunks, results, strict=True):
            found.append(result)
            step(len(chunk))
    return found


@dataclass(frozen=True)
class _Task(Generic[T]):
    """A computation over many molecules."""

    name: str  # prefix of its cache files, with all versions that they depend on
    title: str
    function: Callable[[Sequence[str], int], T]  # arguments: a chunk, and how many of its molecules to detail
    join: Callable[[Sequence[T]], T]
    pack: Callable[[T], dict[str, np.ndarray]]
    unpack: Callable[[Arrays], T]


def _run(task: _Task[T], smiles: Sequence[str], detailed: int, compute: ComputeOptions) -> T:
    """Compute part by part, and cache each finished part."""
    parts = [
        (smiles[start : start + _PART], min(max(detailed - start, 0), _PART, len(smiles) - start))
        for start in range(0, len(smiles), _PART)
    ]
    files = [_cache_file(task.name, compute.cache, *part) for part in parts]
    missing = [index for index, file in enumerate(files) if file is None or not file.is_file()]
    jobs = {index: _jobs(*parts[index]) for index in missing}
    total = sum(len(parts[index][0]) for index in missing)
    made: dict[int, T] = {}
    with (
        _results(task.function, [job for own in jobs.values() for job in own], compute) as results,
        _count(task.title, total, compute) as step,
    ):
        for index, own in jobs.items():
            chunks = []
            for chunk, _ in own:
                chunks.append(next(results))
                step(len(chunk))
            made[index] = task.join(chunks)
            if (file := files[index]) is not None:
                write_npz(file, task.pack(made[index]))
    return task.join([made[i] if i in made else _load(file, task.unpack) for i, file in enumerate(files)])


def _cache_file(name: str, cache: Path | None, smiles: Sequence[str], detailed: int) -> Path | None:
    if cache is None:
        return None
    content = json.dumps([detailed, list(smiles)]).encode()
    return cache / f"{name}-{hashlib.sha256(content).hexdigest()[:24]}.npz"


def _jobs(smiles: Sequence[str], detailed: int) -> list[tuple[Sequence[str], int]]:
    return [(smiles[at : at + _CHUNK], max(0, detailed - at)) for at in range(0, len(smiles), _CHUNK)]


def _count(title: str, total: int, compute: ComputeOptions) -> AbstractContextManager[Callable[[int], None]]:
    return count_up(title, total, shown=compute.progress and total > _CHUNK)


@contextmanager
def _results(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], compute: ComputeOptions
) -> Iterator[Iterator[T]]:
    """Compute the results of the jobs, in order."""
    workers = min(compute.workers, len(jobs) // _JOBS)
    if workers <= 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker, because rounding depends on the number of threads
        try:
            yield (function(*job) for job in jobs)
        finally:
            torch.set_num_threads(before)
        return
    with worker_processes(workers) as pool:
        yield pool.map(partial(_in_worker, function), *zip(*jobs, strict=True))


def _in_worker(function: Callable[..., T], *arguments: Any) -> T:
    torch.set_num_threads(1)  # one core per worker
    return function(*arguments)


def _load(path: Path | None, unpack: Callable[[Arrays], T]) -> T:
    assert path is not None
    arrays = read_npz(path, _REMEDY)
    with reading(path, "file of statistics", _REMEDY):
        return unpack(arrays)


def _checked(arrays: Arrays, name: str, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Return an array. Raises KeyError or ValueError unless it is finite and has this dtype and shape (None: any)."""
    found = arrays[name]
    fits = found.ndim == len(shape) and all(size in (None, own) for size, own in zip(shape, found.shape, strict=True))
    if not fits or not np.issubdtype(found.dtype, dtype):
        raise ValueError(f"{name} has dtype {found.dtype} and shape {found.shape}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise ValueError(f"{name} holds NaN or infinite numbers")
    return found


def _counter(arrays: Arrays, name: str) -> Counter[str]:
    keys = _checked(arrays, name, np.str_, (None,))
    counts = _checked(arrays, f"{name}_count", np.int64, keys.shape)
    if (counts < 1).any() or len(found := Counter(dict(zip(keys.tolist(), counts.tolist(), strict=True)))) != len(keys):
        raise ValueError(f"{name} holds a key twice, or a count below 1")
    return found


def _moments_of_arrays(arrays: Arrays) -> Moments:
    count = int(_checked(arrays, "count", np.integer, ()))
    sum_F = _checked(arrays, "sum", np.float64, (None,))
    products_FF = _checked(arrays, "products", np.float64, (len(sum_F), len(sum_F)))
    if count < 1:
        raise ValueError(f"count={count}")
    return Moments(count, sum_F, products_FF)


def _describe(smiles: Sequence[str], detailed: int) -> SetStatistics:
    with rdBase.BlockLogs():
        molecules = [Chem.MolFromSmiles(text) for text in smiles]
        return SetStatistics(
            fingerprints(molecules[:detailed]),
            Counter(fragment for molecule in molecules for fragment in fragments_of(molecule)),
            Counter(scaffold for molecule in molecules if (scaffold := scaffold_of(molecule)) is not None),
            compute_properties(molecules[:detailed], PROPERTIES),
        )


def _moments(smiles: Sequence[str], _detailed: int, *, device: str) -> Moments:
    return Moments.of(chemnet_activations(smiles, device))


def fingerprints(molecules: Sequence[Chem.Mol]) -> np.ndarray:
    """Compute Morgan fingerprints of radius 2, 1024 bits packed into (N, 128) uint8."""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=_RADIUS, fpSize=_BITS)
    bits = [generator.GetFingerprintAsNumPy(molecule) for molecule in molecules]
    return np.packbits(np.array(bits, np.uint8).reshape(-1, _BITS), axis=1)


def fragments_of(molecule: Chem.Mol) -> list[str]:
    """SMILES of the BRICS fragments of a molecule (Degen et al., ChemMedChem 2008), duplicates included."""
    cut = AllChem.FragmentOnBRICSBonds(molecule)  # type: ignore[attr-defined]
    return Chem.MolToSmiles(cut).split(".")


def scaffold_of(molecule: Chem.Mol) -> str | None:
    """SMILES of the Bemis-Murcko scaffold (J. Med. Chem. 1996); None if it has fewer than two rings."""
    scaffold = MurckoScaffold.GetScaffoldForMol(molecule)
    return Chem.MolToSmiles(scaffold) if scaffold.GetRingInfo().NumRings() >= _SCAFFOLD_RINGS else None
