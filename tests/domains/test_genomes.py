"""Genome metrics against values worked out by hand, by enumeration, and against scipy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from scmdm.domains import letter_ngrams
from scmdm.domains.genomes.figures import genome_figure
from scmdm.domains.genomes.metrics import (
    GenomeReference,
    Spectrum,
    evaluate_genomes,
    gc_contents,
    genome_values,
)
from scmdm.domains.genomes.reading_frames import open_stretches
from scmdm.domains.jensen_shannon import JensenShannon
from scmdm.domains.letter_ngrams import count_ngrams

DNA = st.lists(st.text("ACGTN", max_size=12), max_size=6)
COUNTS = st.lists(st.integers(0, 10**6), min_size=5, max_size=5).map(np.array)


def test_kmers_by_hand():
    """ACGNAC and AC: AC three times, CG once; nothing over the N or from one sequence into the next."""
    counts = count_ngrams(["ACGNAC", "AC", "A", ""], 2, "ACGT")
    assert {i: c for i, c in enumerate(counts.tolist()) if c} == {0b0001: 3, 0b0110: 1}


@given(DNA, st.integers(1, 4), st.sampled_from([1, 9, 1 << 20]))
def test_kmers_by_enumeration(sequences, k, at_once):
    found = [s[i : i + k] for s in sequences for i in range(len(s) - k + 1)]
    every = ["".join(letters) for letters in itertools.product("ACGT", repeat=k)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(letter_ngrams, "_LETTERS_AT_ONCE", at_once)
        counts = count_ngrams(sequences, k, "ACGT")
    assert counts.tolist() == [found.count(kmer) for kmer in every]


def test_jensen_shannon_by_hand():
    """p = (1/2, 1/2), q = (1, 0), m = (3/4, 1/4): (1/2 ln 2/3 + 1/2 ln 2 + ln 4/3) / 2 = 3/4 ln 4/3 = 0.2158 nats."""
    found = JensenShannon.between(np.array([5, 5]), np.array([3, 0]))
    assert found.divergence == pytest.approx(0.75 * math.log(4 / 3))
    assert found.distance == pytest.approx(math.sqrt(0.75 * math.log(4 / 3)))
    apart = JensenShannon.between(np.array([1, 0]), np.array([0, 9]))
    assert apart.divergence == pytest.approx(math.log(2)) and apart.distance == pytest.approx(0.8326, abs=1e-4)
    assert JensenShannon.between(np.array([0, 0]), np.array([1, 0])) is None


@given(COUNTS, COUNTS, st.integers(1, 1000))
def test_the_distance_is_that_of_scipy(p, q, times):
    if not p.any() or not q.any():
        return
    found = JensenShannon.between(p, q)
    with np.errstate(invalid="ignore"):
        assert found.distance == pytest.approx(np.nan_to_num(jensenshannon(p, q)), abs=1e-7)
    assert found.distance == JensenShannon.between(q, p).distance
    assert JensenShannon.between(p, p * times).divergence == pytest.approx(0, abs=1e-15), "nor is it nan"


def test_gc_leaves_out_what_is_unknown():
    assert gc_contents(["GGCA", "ANNN", "GATTACA"]).tolist() == [0.75, 0.0, 2 / 7]
    assert np.isnan(gc_contents(["NNN", ""])).all()


def test_metrics_by_hand():
    """AAAC holds the 3-mers AAA and AAC, AAAA only AAA: as above, p = (1/2, 1/2) against q = (1, 0)."""
    reference = GenomeReference.make(["AAAA"])
    metrics = evaluate_genomes(["AAAC", "AAAC"], [True, False], reference)
    assert metrics["js_divergence_3"] == pytest.approx(0.75 * math.log(4 / 3))
    assert metrics["js_distance_3"] == pytest.approx(math.sqrt(0.75 * math.log(4 / 3)))
    assert metrics["js_divergence_6"] is metrics["js_distance_6"] is None, "too short for a 6-mer"
    assert (metrics["gc_mean"], metrics["gc_reference"], metrics["gc_distance"]) == (0.25, 0.0, 0.25)
    assert (metrics["num_samples"], metrics["num_framed"], metrics["num_distinct"]) == (2, 1, 1)
    assert (metrics["mean_length"], metrics["unknown"], metrics["species"]) == (4.0, 0.0, {})


def test_species_are_weighted_with_their_shares_of_the_reference():
    """Three windows of one species and one of another; samples of the first are perfect, of the second all wrong."""
    reference = GenomeReference.make(["AAAAAA", "AAAAAA", "CCCCCC", "AAAAAA"], ["a", "a", "c", "a"])
    metrics = evaluate_genomes(["GGGGGG", "AAAAAA"], [True, True], reference, ["c", "a"])
    assert metrics["species"]["a"]["js_distance_3"] == 0.0
    assert metrics["species"]["c"]["js_divergence_6"] == pytest.approx(math.log(2))
    assert metrics["species"]["c"]["gc_distance"] == 0.0
    for k in (3, 6):
        assert metrics[f"weighted_js_distance_{k}"] == pytest.approx(0.25 * math.sqrt(math.log(2)))
        assert metrics[f"weighted_js_divergence_{k}"] == pytest.approx(0.25 * math.log(2))
    only_a = evaluate_genomes(["AAAAAA"], [True], reference, ["a"])
    assert set(only_a["species"]) == {"a"} and "weighted_js_distance_3" not in only_a, "nothing to say of c"
    assert evaluate_genomes(["AAAAAA"], [True], reference)["species"] == {}


def test_open_stretches_by_hand():
    """TTAGCA has a stop codon, TAG, in its second frame, its reverse complement TGCTAA one in its first frame."""
    longest, is_open = open_stretches(["TTAGCA", "TAATAATAA", "ACGT", "AC", ""])
    assert longest.tolist() == [2, 3, 1, 0, 0]
    assert is_open.tolist() == [True, True, True, False, False]


@given(st.lists(st.text("ACGTN", max_size=40), max_size=4))
def test_open_stretches_by_enumeration(sequences):
    longest, is_open = open_stretches(sequences)
    for row, sequence in enumerate(sequences):
        reverse = sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))
        codons = [
            [strand[i : i + 3] for i in range(start, len(strand) - 2, 3)]
            for strand in (sequence, reverse)
            for start in range(3)
        ]
        frames = ["".join("x" if codon in ("TAA", "TAG", "TGA") else "." for codon in frame) for frame in codons]
        assert longest[row] == max(len(part) for frame in frames for part in frame.split("x"))
        assert is_open[row] == any(frame and "x" not in frame for frame in frames)


def test_open_frames_against_the_reference():
    """One of two samples has an open frame; the reference's longest stretches are 2 codons, the samples' 2 and 3."""
    closed = "TTAATTAATTAATTAA"  # a stop codon in each frame of both strands
    reference = GenomeReference.make(["CCCCCC", "CCCCCC"])
    metrics = evaluate_genomes(["CCCCCC", closed], [True, True], reference)
    values = genome_values(["CCCCCC", closed], reference)
    assert (metrics["open_frame"], metrics["open_frame_reference"]) == (0.5, 1.0)
    assert values["open_frame"].value() == 0.5 and values["open_frame"].is_share
    assert metrics["open_distance"] == pytest.approx(0.5)


def test_nothing_to_compare():
    metrics = evaluate_genomes(["", "NNN"], [False, True], GenomeReference.make(["ACGTACGT"]))
    assert metrics["gc_mean"] is metrics["gc_distance"] is metrics["js_distance_3"] is None
    assert metrics["unknown"] == 1.0
    assert evaluate_genomes([], [], GenomeReference.make(["ACGT"]))["num_samples"] == 0


def test_figure(tmp_path):
    dice = np.random.default_rng(0)
    real, drawn = (
        [("".join(dice.choice(list("ACGT"), 60, p=p))) for _ in range(30)] for p in ([0.25] * 4, [0.1, 0.4] * 2)
    )
    arms = {"one": Spectrum.of(drawn), "nothing": Spectrum.of(["NN"])}
    path = genome_figure(Spectrum.of(real), arms, tmp_path / "spectra.png")
    assert path.read_bytes().startswith(b"\x89PNG")
