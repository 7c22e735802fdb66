"""Quality of generated molecules: validity, uniqueness, novelty, property distributions, FCD.

The QM9 protocol of kuleshov-group/discrete-diffusion-guidance is 1024 samples at T = 32. Papers count and normalise
differently, so that all ways are given: see `measure_molecules` for those of this project, `measure_as_published` for
those of the published QM9 table.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors
from scipy.stats import wasserstein_distance

from scmdm.domains.interface import Measured
from scmdm.domains.sample_values import SampleValues, distinct_parts, first_occurrences
from scmdm.domains.wasserstein import wasserstein_of_counts
from scmdm.system.package_data import optional

Property = Callable[[Chem.Mol], float]
PROPERTIES: dict[str, Property] = {
    "QED": QED.qed,
    "logP": Crippen.MolLogP,  # type: ignore[attr-defined]
    "molecular weight": Descriptors.MolWt,  # type: ignore[attr-defined]
    "TPSA": rdMolDescriptors.CalcTPSA,
    "heavy atoms": lambda molecule: float(molecule.GetNumHeavyAtoms()),
    "rings": lambda molecule: float(rdMolDescriptors.CalcNumRings(molecule)),
}
FCD_MOLECULES = 512  # fixed, because the distance of a small set is biased upwards
_PROBLEMS = {
    "AtomValenceException": "valence",
    "KekulizeException": "aromaticity",
    "AtomKekulizeException": "aromaticity",  # an aromatic atom outside a ring
}


@dataclass(frozen=True)
class MoleculeReference:
    """Training and held-out molecules. Make it once for many evaluations."""

    train: frozenset[str]  # canonical SMILES
    properties: dict[str, np.ndarray]
    fcd_statistics: tuple[np.ndarray, np.ndarray] | None

    @classmethod
    def make(cls, train: Sequence[str], held_out: Sequence[str], *, fcd: bool) -> MoleculeReference:
        """Read canonical SMILES. Novelty refers to `train`, property distances and FCD to `held_out`."""
        return cls(frozenset(train), properties(held_out), _fcd_statistics(held_out) if fcd else None)


def parse_molecule(smiles: str) -> Chem.Mol | None:
    """Parse and sanitise a SMILES; None if it is invalid or empty."""
    # RDKit reads text after a space as the molecule's name, so a SMILES with a space would pass.
    if not smiles or any(symbol.isspace() for symbol in smiles):
        return None
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def measure_molecules(smiles: Sequence[str], framed: Sequence[bool], reference: MoleculeReference) -> Measured:
    """Compute all metrics of generated SMILES, and the values for intervals; the FCD has none: it would cost too much.

    A sample is valid if it is `framed`, not empty, and RDKit parses and sanitises it. Samples that are not framed are
    excluded because a fragment before a stray [EOS] is often a small valid molecule. A ratio with denominator 0 is 0.
    """
    parsed = [parse_molecule(text) for text in smiles]
    framed_N, parsed_N = np.array(framed, bool), np.array([found is not None for found in parsed], bool)
    valid_N = framed_N & parsed_N
    whole = [found if ok else None for found, ok in zip(parsed, framed, strict=True)]
    molecules = [molecule for molecule in whole if molecule is not None]
    canonical = [None if molecule is None else Chem.MolToSmiles(molecule) for molecule in whole]
    first_N = first_occurrences(canonical) & valid_N
    unknown_N = np.array([text not in reference.train for text in canonical], bool)
    novel_N = first_N & unknown_N
    unique_N, new_N = _distinct(canonical, valid_N), _distinct(canonical, valid_N & unknown_N)
    values = {
        "validity": SampleValues.mean(valid_N),
        "parsed": SampleValues.mean(parsed_N),
        "framed": SampleValues.mean(framed_N),
        "uniqueness_of_samples": SampleValues.ratio(unique_N, np.ones(len(smiles))),
        "novelty_of_samples": SampleValues.ratio(new_N, np.ones(len(smiles))),
        "novelty_of_unique": SampleValues.ratio(new_N, unique_N),
    }
    # Use the parsed molecules, because RDKit cannot parse every canonical SMILES that it writes.
    own = compute_properties(molecules, PROPERTIES) if molecules else {}
    distances = {name: normalised_distance(own[name], reference.properties[name]) for name in own}
    fcd, fcd_note = _fcd([text for text in canonical if text is not None], reference.fcd_statistics)
    framing = {"framing": len(smiles) - sum(framed)} if not all(framed) else {}
    unparsed = [text for text, ok, found in zip(smiles, framed, parsed, strict=True) if ok and found is None]
    metrics = {
        "num_samples": len(smiles),
        "num_framed": int(framed_N.sum()),  # samples with [BOS], [EOS] and padding placed as in the data
        "num_parsed": int(parsed_N.sum()),  # samples whose text before the first [EOS] is a molecule
        "num_valid": int(valid_N.sum()),  # framed and parsed
        "num_unique": int(first_N.sum()),  # distinct canonical forms among the valid
        "num_novel": int(novel_N.sum()),  # unique molecules that are not in the training set
        "property_distance": float(np.mean(list(distances.values()))) if distances else None,
        "property_distances": distances,
        "fcd": fcd,
        "fcd_note": fcd_note,  # reason why `fcd` is None although it was requested
        "invalid_reasons": framing | invalid_reasons(unparsed),
        **{name: values[name].value() or 0.0 for name in ("validity", "parsed", "framed")},
        "uniqueness_of_samples": float(first_N.mean()) if smiles else 0.0,
        "novelty_of_samples": float(novel_N.mean()) if smiles else 0.0,
        "uniqueness_of_valid": float(first_N.sum() / max(1, valid_N.sum())),
        "novelty_of_unique": float(novel_N.sum() / max(1, first_N.sum())),
    }
    if own:
        values["property_distance"] = _property_distance_values(own, valid_N, reference)
    return Measured(metrics, values)


def _distinct(texts: Sequence[str | None], chosen_N: np.ndarray) -> np.ndarray:
    return distinct_parts([[text] if chosen else [] for text, chosen in zip(texts, chosen_N, strict=True)])


def _property_distance_values(
    own: Mapping[str, np.ndarray], valid_N: np.ndarray, reference: MoleculeReference
) -> SampleValues:
    distances = [
        (wasserstein_of_counts(own[name], real_M), real_M.std() or 1.0) for name, real_M in reference.properties.items()
    ]

    def distance(counts_N: np.ndarray) -> float:
        return float(np.mean([of(counts_N[valid_N]) / scale for of, scale in distances]))

    return SampleValues.jackknife(distance, len(valid_N))


def measure_as_published(bare: Sequence[str], known: frozenset[str]) -> Measured:
    """Validity, uniqueness and novelty as kuleshov-group/discrete-diffusion-guidance counts them on QM9.

    `bare` are the samples without special tokens, wherever they occur: text after an early [EOS] belongs to the
    sample. A sample is valid if it is not empty and RDKit parses it. Uniqueness and novelty compare strings, not
    molecules, and are shares of the valid samples. A string is novel if it is not in `known`, all strings of the data
    set (training and held-out).
    """
    valid_N = np.array([parse_molecule(text) is not None for text in bare], bool)
    first_N = first_occurrences([text if ok else None for text, ok in zip(bare, valid_N, strict=True)]) & valid_N
    unknown_N = np.array([text not in known for text in bare], bool)
    novel_N = first_N & unknown_N
    values = {
        "published_validity": SampleValues.mean(valid_N),
        "published_uniqueness": SampleValues.ratio(_distinct(bare, valid_N), valid_N),
        "published_novelty": SampleValues.ratio(_distinct(bare, valid_N & unknown_N), valid_N),
    }
    counts = {"valid": valid_N, "unique": first_N, "novel": novel_N}
    metrics = {
        **{f"published_num_{name}": int(found_N.sum()) for name, found_N in counts.items()},
        "published_validity": values["published_validity"].value() or 0.0,
        "published_uniqueness": float(first_N.sum() / max(1, valid_N.sum())),
        "published_novelty": float(novel_N.sum() / max(1, valid_N.sum())),
    }
    return Measured(metrics, values)


def properties(smiles: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute values (N,) float64 of each property of `PROPERTIES`."""
    return compute_properties([Chem.MolFromSmiles(text) for text in smiles], PROPERTIES)


def compute_properties(molecules: Sequence[Chem.Mol], table: Mapping[str, Property]) -> dict[str, np.ndarray]:
    """Compute values (N,) float64 of each property of a table."""
    return {name: np.array([compute(m) for m in molecules], np.float64) for name, compute in table.items()}


def normalised_distance(sample: np.ndarray, reference: np.ndarray) -> float:
    """1-Wasserstein distance in standard deviations of the reference, or in the property's unit if it is constant."""
    return float(wasserstein_distance(sample, reference) / (reference.std() or 1.0))


def invalid_reasons(smiles: Sequence[str]) -> dict[str, int]:
    """Count the reasons why SMILES are invalid, most frequent first."""
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
    """Classify a SMILES with a syntax error: unbalanced parentheses, an open ring, or anything else."""
    bare = re.sub(r"\[[^\]]*\]", "A", text)  # digits in brackets are isotopes, hydrogens and charges
    if bare.count("(") != bare.count(")"):
        return "parentheses"
    labels = Counter(re.findall(r"%\d\d|\d", bare))
    return "ring closure" if any(times % 2 for times in labels.values()) else "syntax"


def chemnet_activations(smiles: Sequence[str], device: str = "cpu") -> np.ndarray:
    """Compute activations (N, 512) float32 of ChemNet's last hidden layer. The package fcd contains the network."""
    fcd = optional("fcd", "the Frechet ChemNet distance", "molecules")
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        # n_jobs=0: starting a worker process costs more than it saves for a thousand molecules.
        model = fcd.load_ref_model()
        activations: np.ndarray = fcd.get_predictions(model, list(smiles), n_jobs=0, device=device)
    return activations


def _fcd_statistics(smiles: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of ChemNet's activations."""
    activations = chemnet_activations(smiles)
    return activations.mean(0), np.cov(activations.T)


def _fcd(valid: Sequence[str], statistics: tuple[np.ndarray, np.ndarray] | None) -> tuple[float | None, str | None]:
    """Frechet ChemNet distance (Preuer et al. 2018) of the first `FCD_MOLECULES` molecules, or None and the reason.

    The reason is None, too, if it was not requested (`statistics` is None).
    """
    if statistics is None:
        return None, None
    if len(valid) < FCD_MOLECULES:
        return None, f"{len(valid)} valid molecules, fewer than {FCD_MOLECULES}"
    fcd = optional("fcd", "the Frechet ChemNet distance", "molecules")
    return float(fcd.calculate_frechet_distance(*_fcd_statistics(valid[:FCD_MOLECULES]), *statistics)), None
