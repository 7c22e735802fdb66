"""Molecule metrics against values worked out by hand."""

import numpy as np
import pytest

from scmdm.data.tokenizers import SmilesTokenizer
from scmdm.domains.molecules import metrics
from scmdm.domains.molecules.domain import bare_texts
from scmdm.domains.molecules.figures import molecule_grid
from scmdm.domains.molecules.metrics import (
    MoleculeReference,
    invalid_reasons,
    measure_as_published,
    measure_molecules,
    normalised_distance,
    properties,
)

TRAIN = ["CCO", "c1ccccc1", "CC(C)C"]
HELD_OUT = ["CCN", "CCCO", "c1ccncc1", "CC=O", "C#N"]


def evaluate(smiles, reference):
    return measure_molecules(smiles, [True] * len(smiles), reference).metrics


def test_counts_and_both_denominators():
    """Nine samples: ethanol and benzene in two spellings each, pyridine, methane, and three that are invalid."""
    samples = ["OCC", "CCO", "C1=CC=CC=C1", "c1ccccc1", "c1ccncc1", "C", "CC(C)(C)(C)C", "C1CC", ""]
    metrics = evaluate(samples, MoleculeReference.make(TRAIN, HELD_OUT, fcd=False))
    assert (metrics["num_samples"], metrics["num_valid"], metrics["num_unique"], metrics["num_novel"]) == (9, 6, 4, 2)
    assert metrics["validity"] == pytest.approx(6 / 9)
    assert metrics["uniqueness_of_valid"] == pytest.approx(4 / 6)
    assert metrics["uniqueness_of_samples"] == pytest.approx(4 / 9)
    assert metrics["novelty_of_unique"] == pytest.approx(2 / 4)
    assert metrics["novelty_of_samples"] == pytest.approx(2 / 9)
    assert metrics["invalid_reasons"] == {"valence": 1, "ring closure": 1, "empty": 1}
    assert metrics["fcd"] is None


def test_malformed_samples_are_not_valid_whatever_their_fragment_is():
    """Ethanol whole, ethanol as a fragment of something longer, an invalid fragment, an invalid whole."""
    samples, framed = ["CCO", "CCO", "C1C", "C(("], [True, False, False, True]
    metrics = measure_molecules(samples, framed, MoleculeReference.make(TRAIN, HELD_OUT, fcd=False)).metrics
    assert (metrics["num_framed"], metrics["num_parsed"], metrics["num_valid"]) == (2, 2, 1)
    assert metrics["invalid_reasons"] == {"framing": 2, "parentheses": 1}


def test_both_ways_of_counting_by_hand():
    """Seven samples for which the project's and the published counts of QM9 differ in every number.

    1 `CCO` whole, in the training set. 2 `OCC`, the same molecule in another spelling. 3 `CCN`, of the held-out set.
    4 `C[EOS]O`: a fragment by its frame, `CO` without special tokens. 5 `[EOS]` alone. 6 `CC[BOS]`: a mark inside.
    7 `C(`. Framed: 1, 2, 3, 7. Here valid are 1, 2, 3: two molecules, of which `CCN` is not in the training set.
    Published: valid are 1, 2, 3, 4, 6: five distinct strings, of which `OCC`, `CO`, `CC` are not in the data set.
    """
    tokenizer = SmilesTokenizer(["C", "O", "N", "("])  # ids 4 to 7
    c, o, n = 4, 5, 6
    rows = [
        [1, c, c, o, 2, 0],
        [1, o, c, c, 2, 0],
        [1, c, c, n, 2, 0],
        [1, c, 2, o, 0, 0],
        [1, 2, 0, 0, 0, 0],
        [1, c, c, 1, 2, 0],
        [1, c, 7, 2, 0, 0],
    ]
    bare, known = bare_texts(rows, tokenizer), frozenset(["CCO", "CCN", "CC=O"])
    assert bare == ["CCO", "OCC", "CCN", "CO", "", "CC", "C("]
    found = measure_as_published(bare, known).metrics
    assert [found[f"published_num_{name}"] for name in ("valid", "unique", "novel")] == [5, 5, 3]
    assert [found[f"published_{name}"] for name in ("validity", "uniqueness", "novelty")] == [5 / 7, 1.0, 3 / 5]
    framed = [True, True, True, False, False, False, True]
    texts = [tokenizer.decode(row) for row in rows]
    own = measure_molecules(texts, framed, MoleculeReference.make(["CCO"], ["CCN", "CC=O"], fcd=False)).metrics
    assert (own["num_valid"], own["num_unique"], own["num_novel"]) == (3, 2, 1)
    assert own["validity"] == 3 / 7 and own["novelty_of_samples"] == 1 / 7


def test_published_values_give_the_published_metrics():
    bare, known = ["CCO", "CCO", "OCC", "C(", "", "CN"], frozenset(["CCO"])
    measured = measure_as_published(bare, known)
    found, values = measured.metrics, measured.values
    assert found["published_validity"] == 4 / 6
    assert found["published_uniqueness"] == 3 / 4 and found["published_novelty"] == 2 / 4
    for name, value in values.items():
        assert value.value() == pytest.approx(found[name])
    nothing = measure_as_published(["(", ""], known).metrics
    assert nothing["published_uniqueness"] == nothing["published_novelty"] == 0.0
    assert measure_as_published(["("], known).values["published_novelty"].value() is None


def test_nothing_valid():
    metrics = evaluate(["(", "CC(C)(C)(C)C"], MoleculeReference.make(TRAIN, HELD_OUT, fcd=True))
    assert metrics["num_valid"] == 0 and metrics["uniqueness_of_valid"] == 0.0
    assert metrics["property_distance"] is None and metrics["fcd"] is None


def test_reasons():
    assert invalid_reasons(["C(", "F(C)C", ""]) == {"parentheses": 1, "valence": 1, "empty": 1}
    assert invalid_reasons(["c1ccc1c", "c1cccc1", "O(C)(C)C"])["valence"] == 1


def test_property_distance_by_hand():
    """Moving all mass by two, in units of the reference's standard deviation (1/2 here)."""
    assert normalised_distance(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == pytest.approx(2 / 0.5)
    found = properties(["CCO", "C"])
    assert found["heavy atoms"].tolist() == [3, 1]
    assert found["molecular weight"] == pytest.approx([46.07, 16.04], abs=0.01)
    same = evaluate(HELD_OUT, MoleculeReference.make(TRAIN, HELD_OUT, fcd=False))
    assert same["property_distance"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_fcd_is_zero_on_itself_and_grows_with_difference(monkeypatch):
    monkeypatch.setattr(metrics, "FCD_MOLECULES", 60)
    alkanes = ["C" * n for n in range(1, 31)] + ["C" * n + "O" for n in range(1, 31)]
    aromatics = ["c1ccccc1" + "C" * n for n in range(30)] + ["c1ccncc1" + "C" * n for n in range(30)]
    reference = MoleculeReference.make(TRAIN, alkanes, fcd=True)
    assert evaluate(alkanes, reference)["fcd"] == pytest.approx(0.0, abs=1e-2)
    assert evaluate(aromatics, reference)["fcd"] > 5
    # Neither invalid strings in between nor more valid molecules behind change it.
    assert evaluate(["C(", *alkanes, *aromatics], reference)["fcd"] == pytest.approx(0.0, abs=1e-2)
    few = evaluate(alkanes[:59], reference)
    assert few["fcd"] is None and few["fcd_note"] == "59 valid molecules, fewer than 60"


def test_grid_draws_valid_molecules_only(tmp_path):
    assert molecule_grid(["CCO", "C1CC", "OCC", "c1ccccc1"], tmp_path / "grid.png") == 2
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert molecule_grid(["("], tmp_path / "empty.png") == 0
