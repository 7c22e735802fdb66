"""Quality of generated molecules: validity, uniqueness, novelty, property distributions, FCD.

The protocol of QM9 in kuleshov-group/discrete-diffusion-guidance is 1024 samples at T = 32. Papers divide uniqueness
and novelty by different numbers, so both are given.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import QED, Crippen, Descriptors, Draw, rdMolDescriptors
from scipy.stats import wasserstein_distance

from scmdm.system.files import atomic_write_bytes

PROPERTIES: dict[str, Callable[[Chem.Mol], float]] = {
    "QED": QED.qed,
    "logP": Crippen.MolLogP,  # type: ignore[attr-defined]
    "molecular weight": Descriptors.MolWt,  # type: ignore[attr-defined]
    "TPSA": rdMolDescriptors.CalcTPSA,
    "heavy atoms": lambda molecule: float(molecule.GetNumHeavyAtoms()),
    "rings": lambda molecule: float(rdMolDescriptors.CalcNumRings(molecule)),
}
FCD_MOLECULES = 512  # the distance of few molecules is biased upwards: every set gives the same number of them
_PROBLEMS = {
    "AtomValenceException": "valence",
    "KekulizeException": "aromaticity",
    "AtomKekulizeException": "aromaticity",  # an aromatic atom outside a ring
}


@dataclass(frozen=True)
class MoleculeMetrics:
    """Counts and ratios over `num_samples` samples."""

    num_samples: int
    num_framed: int  # begin, end and padding are where the data has them
    num_parsed: int  # the text before the first end mark is a molecule, whatever is behind it: the lenient count
    num_valid: int  # framed and parsed
    num_unique: int  # distinct canonical forms among the valid
    num_novel: int  # of those, not in the training set
    property_distance: float | None  # mean over properties of the normalised Wasserstein distances
    property_distances: dict[str, float] = field(default_factory=dict)
    fcd: float | None = None
    fcd_note: str | None = None  # why `fcd` is None
    invalid_reasons: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything, the ratios too; a ratio of nothing is 0."""
        return {
            **asdict(self),
            "validity": _ratio(self.num_valid, self.num_samples),
            "parsed": _ratio(self.num_parsed, self.num_samples),
            "framed": _ratio(self.num_framed, self.num_samples),
            "uniqueness_of_valid": _ratio(self.num_unique, self.num_valid),
            "uniqueness_of_samples": _ratio(self.num_unique, self.num_samples),
            "novelty_of_unique": _ratio(self.num_novel, self.num_unique),
            "novelty_of_samples": _ratio(self.num_novel, self.num_samples),
        }


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; make it once for many evaluations."""

    train: frozenset[str]  # canonical
    properties: dict[str, np.ndarray]
    fcd_statistics: tuple[np.ndarray, np.ndarray] | None

    @classmethod
    def make(cls, train: Sequence[str], held_out: Sequence[str], *, fcd: bool) -> Reference:
        """`train` and `held_out` are canonical SMILES; the properties and the FCD are those of `held_out`."""
        return cls(frozenset(train), properties(held_out), _fcd_statistics(held_out) if fcd else None)


def parse_molecule(smiles: str) -> Chem.Mol | None:
    """The sanitised molecule; None for what is not one molecule, or an empty one."""
    # RDKit takes what follows a space for the molecule's name: such a string is not one molecule.
    if not smiles or any(symbol.isspace() for symbol in smiles):
        return None
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def evaluate_molecules(smiles: Sequence[str], framed: Sequence[bool], reference: Reference) -> MoleculeMetrics:
    """All metrics of generated SMILES.

    Valid: RDKit parses and sanitises it, it is not empty, and the sample is `framed` as the data is. A fragment cut off
    at a stray end mark is often a small molecule, so without the last condition a malformed sample may count.
    """
    parsed = [parse_molecule(text) for text in smiles]
    whole = [found if ok else None for found, ok in zip(parsed, framed, strict=True)]
    molecules = [molecule for molecule in whole if molecule is not None]
    unparsed = [text for text, ok, found in zip(smiles, framed, parsed, strict=True) if ok and found is None]
    not_framed = len(smiles) - sum(framed)
    valid = [Chem.MolToSmiles(molecule) for molecule in molecules]
    distances = {}
    if molecules:
        # From the parsed molecules: reading the canonical forms again would be work twice, and could fail.
        found = _properties(molecules)
        distances = {name: normalised_distance(found[name], ref) for name, ref in reference.properties.items()}
    fcd, fcd_note = _fcd(valid, reference.fcd_statistics)
    return MoleculeMetrics(
        num_samples=len(smiles),
        num_framed=sum(framed),
        num_parsed=sum(found is not None for found in parsed),
        num_valid=len(valid),
        num_unique=len(set(valid)),
        num_novel=len(set(valid) - reference.train),
        property_distance=float(np.mean(list(distances.values()))) if distances else None,
        property_distances=distances,
        fcd=fcd,
        fcd_note=fcd_note,
        invalid_reasons=({"framing": not_framed} if not_framed else {}) | invalid_reasons(unparsed),
    )


def properties(smiles: Sequence[str]) -> dict[str, np.ndarray]:
    """Each property of each molecule, (N,) float64."""
    return _properties([Chem.MolFromSmiles(text) for text in smiles])


def _properties(molecules: Sequence[Chem.Mol]) -> dict[str, np.ndarray]:
    return {name: np.array([compute(m) for m in molecules]) for name, compute in PROPERTIES.items()}


def normalised_distance(sample: np.ndarray, reference: np.ndarray) -> float:
    """1-Wasserstein distance in units of the reference's standard deviation; of the property if that is constant."""
    return float(wasserstein_distance(sample, reference) / (reference.std() or 1.0))


def invalid_reasons(smiles: Sequence[str]) -> dict[str, int]:
    """Why strings are not molecules, most frequent first."""
    counts: Counter[str] = Counter()
    with rdBase.BlockLogs():
        for text in smiles:
            counts[_reason(text)] += 1
    return dict(counts.most_common())


def _reason(text: str) -> str:
    if not text.strip():
        return "empty"
    molecule = Chem.MolFromSmiles(text, sanitize=False)
    if molecule is None or any(symbol.isspace() for symbol in text):
        return _syntax_reason(text)
    problems = Chem.DetectChemistryProblems(molecule)
    return _PROBLEMS.get(problems[0].GetType() if problems else "", "other")


def _syntax_reason(text: str) -> str:
    """What a SMILES that cannot be read left open, parentheses before rings."""
    bare = re.sub(r"\[[^\]]*\]", "A", text)  # digits in brackets are isotopes, hydrogens and charges
    if bare.count("(") != bare.count(")"):
        return "parentheses"
    labels = Counter(re.findall(r"%\d\d|\d", bare))
    return "ring closure" if any(times % 2 for times in labels.values()) else "syntax"


def chemnet_activations(smiles: Sequence[str], device: str = "cpu") -> np.ndarray | None:
    """ChemNet's last hidden layer, (N, 512) float32; None without the package `fcd`, which ships the network."""
    if importlib.util.find_spec("fcd") is None:
        return None
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from fcd import get_predictions, load_ref_model

        # No worker process: for a thousand molecules forking one saves nothing.
        activations: np.ndarray = get_predictions(load_ref_model(), list(smiles), n_jobs=0, device=device)
    return activations


def _fcd_statistics(smiles: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and covariance of ChemNet's activations; None without the package `fcd`."""
    activations = chemnet_activations(smiles)
    return None if activations is None else (activations.mean(0), np.cov(activations.T))


def _fcd(valid: Sequence[str], statistics: tuple[np.ndarray, np.ndarray] | None) -> tuple[float | None, str | None]:
    """Frechet ChemNet distance (Preuer et al. 2018) of the first `FCD_MOLECULES`, or None and the reason.

    More valid molecules must not look like a better distribution, so the number is the same for all.
    """
    if statistics is None:
        return None, "not asked for, or the package fcd is not installed"
    if len(valid) < FCD_MOLECULES:
        return None, f"{len(valid)} valid molecules, fewer than {FCD_MOLECULES}"
    from fcd import calculate_frechet_distance

    found = _fcd_statistics(valid[:FCD_MOLECULES])
    assert found is not None
    return float(calculate_frechet_distance(*found, *statistics)), None


def draw_grid(smiles: Sequence[str], path: Path, *, columns: int = 8, rows: int = 3, cell: int = 180) -> int:
    """Draw the first valid distinct molecules, with their QED, as a PNG; returns how many were drawn."""
    distinct: dict[str, Chem.Mol] = {}
    for molecule in filter(None, map(parse_molecule, smiles)):
        distinct.setdefault(Chem.MolToSmiles(molecule), molecule)
    molecules = list(distinct.values())[: columns * rows]
    legends = [f"QED {QED.qed(molecule):.2f}" for molecule in molecules]
    image = Draw.MolsToGridImage(
        molecules or [Chem.MolFromSmiles("")], molsPerRow=columns, subImgSize=(cell, cell), legends=legends or [""]
    )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    atomic_write_bytes(path, buffer.getvalue())
    return len(molecules)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
