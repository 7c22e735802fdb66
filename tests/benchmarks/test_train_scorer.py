"""A scorer that is trained here is one that the metrics of text load."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import train_scorer
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
    assert {weight.dtype for weight in load_file(tmp_path / "scorer/model.safetensors").values()} == {torch.bfloat16}
    assert {weight.dtype for weight in scorer.model.parameters()} == {torch.float32}, "scored in float32"
    assert scorer.tokenizer.decode(scorer.tokenizer.encode("to be, or")) == "to be, or"


@pytest.mark.slow
def test_an_interrupted_training_goes_on(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 20)
    size = ["--width", "64", "--layers", "1", "--length", "16", "--batch", "2", "--steps", "30"]
    main([str(text), "--out", str(tmp_path / "whole"), *size])
    monkeypatch.setattr(train_scorer, "_KEEP_EVERY", 10)
    drawn = train_scorer.keyed_uniform

    def interrupted(seed, purpose, step, *given):
        if step == 25:
            raise KeyboardInterrupt
        return drawn(seed, purpose, step, *given)

    monkeypatch.setattr(train_scorer, "keyed_uniform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([str(text), "--out", str(tmp_path / "parts"), *size])
    monkeypatch.setattr(train_scorer, "keyed_uniform", drawn)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    for files, options, named in (
        ([text], ["--lr", "0.1"], "--lr"),
        ([text], ["--steps", "40"], "--steps"),
        ([other], [], "file 1"),
        ([text, other], [], "file 2"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, files), "--out", str(tmp_path / "parts"), *size, *options])
        assert ended.value.code == 2 and named in capsys.readouterr().err
    main([str(text), "--out", str(tmp_path / "parts"), *size])
    files = {path.name for path in (tmp_path / "parts").iterdir()}
    assert files == {path.name for path in (tmp_path / "whole").iterdir()}
    for name in ("scorer.json", "model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("a" * 19, [], "text.txt"),
        ("a" * 99, ["--width", "48"], "48"),
        ("a" * 99, ["--length", "5"], "--length"),  # 4 characters are held out
    ],
)
def test_text_and_width_that_leave_nothing(tmp_path, capsys, text, options, named):
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
