"""Protein metrics by hand, by enumeration and against scipy."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from scmdm.cli import main
from scmdm.domains.letter_ngrams import count_ngrams
from scmdm.domains.proteins.domain import ProteinsDomain
from scmdm.domains.proteins.metrics import AMINO_ACIDS, ProteinReference, is_protein, measure_proteins

SEQUENCES = st.lists(st.text(AMINO_ACIDS + "XB*", max_size=12), max_size=6)


@given(SEQUENCES, st.integers(1, 3))
def test_ngrams_by_enumeration(sequences, n):
    """No n-gram reaches from one sequence into the next, or contains a letter that is no amino acid."""
    found = [s[i : i + n] for s in sequences for i in range(len(s) - n + 1)]
    every = ["".join(letters) for letters in itertools.product(AMINO_ACIDS, repeat=n)]
    assert count_ngrams(sequences, n, AMINO_ACIDS).tolist() == [found.count(gram) for gram in every]


def test_counts_by_hand():
    """Seven samples: one novel, one of the training set twice, and four that are not valid."""
    train, held_out = ["MKV", "ACDE", "GGGG"], ["MKVA", "ACD"]
    texts = ["MKVL", "ACDE", "ACDE", "", "MXV", "mkv", "GGG"]
    framed = [True, True, True, True, True, True, False]
    found = measure_proteins(texts, framed, ProteinReference.make(train, held_out)).metrics
    assert (found["num_samples"], found["num_framed"], found["num_valid"]) == (7, 6, 3)
    assert (found["num_unique"], found["num_novel"]) == (2, 1)
    assert found["validity"] == pytest.approx(3 / 7) and found["novelty_of_unique"] == 1 / 2
    assert found["mean_length"] == 4 and found["length_distance"] == pytest.approx(0.5)
    own, real = (count_ngrams(texts, 2, AMINO_ACIDS) for texts in (["MKVL", "ACDE", "ACDE"], held_out))
    assert found["js_distance_2"] == pytest.approx(jensenshannon(own, real))
    floor = count_ngrams(train, 2, AMINO_ACIDS)  # three valid samples: three training sequences
    assert found["js_distance_2_floor"] == pytest.approx(jensenshannon(floor, real))
    assert all(metric.name in found for metric in ProteinsDomain.metrics)


def test_without_valid_samples():
    found = measure_proteins(["X", ""], [True, True], ProteinReference.make(["MKV"], ["MKV"])).metrics
    assert found["validity"] == 0 and found["js_distance_3"] is None and found["length_distance"] is None
    assert not is_protein("") and is_protein(AMINO_ACIDS) and not is_protein("AXA")


def test_random_sequences_are_farther_than_real_ones():
    """A set with its own composition is at its floor; uniform letters of the same lengths are far beyond."""
    dice = np.random.default_rng(0)
    letters, weights = list(AMINO_ACIDS), dice.dirichlet(np.ones(20))
    real = ["".join(dice.choice(letters, 60, p=weights)) for _ in range(300)]
    uniform = ["".join(dice.choice(letters, 60)) for _ in range(100)]
    reference = ProteinReference.make(real[:100], real[100:200])
    same, other = (measure_proteins(texts, [True] * 100, reference).metrics for texts in (real[200:], uniform))
    for name in ("js_distance_1", "js_distance_2", "js_distance_3"):
        assert same[name] == pytest.approx(same[f"{name}_floor"], rel=0.3)
        assert other[name] > 1.3 * other[f"{name}_floor"]


def test_figure(tmp_path):
    rows = [{"text": "MKVLA" * 3, "framed": True}, {"text": "X", "framed": True}]
    caption = ProteinsDomain.compare({"held out": rows, "samples": rows}, tmp_path / "figure.png")
    assert "composition" in caption and (tmp_path / "figure.png").stat().st_size > 5000
    nothing = [{"text": "MKV", "framed": False}]
    assert ProteinsDomain.compare({"held out": rows, "samples": nothing}, tmp_path / "none.png") is None


def test_from_fasta_to_metrics(tmp_path, capsys):
    """Prepared, trained, evaluated and sampled by the command line."""
    dice = np.random.default_rng(0)
    sequences = ["".join(dice.choice(list("AGLKE"), dice.integers(5, 28))) for _ in range(200)]
    (tmp_path / "proteins.faa").write_text("".join(f">p{i}\n{text}\n" for i, text in enumerate(sequences)))
    (tmp_path / "empty.yaml").write_text("{}")
    empty, data, run, out = (str(tmp_path / name) for name in ("empty.yaml", "data", "run", "found.json"))
    source = ["source.name=proteins", f"source.path={tmp_path / 'proteins.faa'}", "tokenizer.name=amino_acids"]
    fractions = ["length=32", "validation_fraction=0.2", "test_fraction=0.3", "workers=1"]
    assert main(["prepare", empty, *source, *fractions, f"out={data}"]) == 0
    model = ["model.width=16", "model.layers=1", "model.heads=2", "model.condition_width=8"]
    train = ["train.steps=2", "train.global_batch_size=16", "train.micro_batch_size=16"]
    assert main(["train", empty, f"data.path={data}", f"run_dir={run}", *model, *train]) == 0
    assert main(["evaluate", run, "num=20", "nelbo_samples=8", "sampler.steps=4", f"out={out}"]) == 0
    assert "framed, % of samples" in capsys.readouterr().out
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["domain"] == "proteins" and 0 <= result["samples"][0]["metrics"]["validity"] <= 1
    assert main(["evaluate", run, "num=20", "metrics.fcd=true"]) == 1
    assert "metrics.fcd is not a key" in capsys.readouterr().err
