"""A scorer that is trained here is one that the metrics of text load."""

import json

import pytest

from benchmarks.train_scorer import main
from scmdm.domains.text.causal_scorer import check_scorer, load_scorer


@pytest.mark.slow
def test_a_trained_scorer_scores_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 200)
    size = ["--width", "64", "--layers", "1", "--length", "32", "--batch", "4", "--steps", "60", "--lr", "0.01"]
    main([str(text), "--out", str(tmp_path / "scorer"), *size])
    assert json.loads((tmp_path / "scorer/scorer.json").read_text())["held_out_perplexity"] < 10
    check_scorer(tmp_path / "scorer")
    scorer = load_scorer(tmp_path / "scorer")
    assert scorer.length == 32
    assert scorer.tokenizer.decode(scorer.tokenizer.encode("to be, or")) == "to be, or"
