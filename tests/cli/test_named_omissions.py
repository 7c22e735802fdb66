"""What a command leaves out or does not find is named."""

import pytest

from scmdm.cli import main
from scmdm.config.shipped_command import list_shipped
from scmdm.domains.text.causal_scorer import check_scorer


def test_shipped_models_are_called_what_they_are(capsys):
    list_shipped()
    kinds = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if " model, " in line}
    assert kinds["configs/qm9/base-model"] == "base" and kinds["configs/qm9/long-scmdm"] == "adapted"


def test_a_shipped_scorer_is_listed_and_copied_as_one(tmp_path, capsys):
    list_shipped()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("configs/text/scorer "))
    assert "scorer" in line.split() and "metrics.scorer" in line
    assert main(["configs", "copy", "text/scorer", "--to", str(tmp_path)]) == 0
    assert check_scorer(tmp_path / "configs/text/scorer")["model_type"] == "llama"


@pytest.mark.parametrize("command", [["checkpoint", "list"], ["checkpoint", "verify"], ["sample"]])
def test_a_path_that_does_not_exist_is_said_to(command, tmp_path, capsys):
    assert main([*command, str(tmp_path / "missing")]) == 1
    assert "missing does not exist" in capsys.readouterr().err


def test_fragments_that_a_format_leaves_out_are_counted(base, tmp_path, capsys):
    """A base of a few steps draws hardly any framed sequence."""
    out = tmp_path / "a.smi"
    assert main(["sample", str(base), "num=8", "sampler.steps=4", f"out={out}"]) == 0
    missing = 8 - len(out.read_text().splitlines())
    assert missing and f"where {missing} are left out" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_a_format_that_samples_do_not_have_is_refused_before_they_are_drawn(tmp_path, monkeypatch, capsys, suffix):
    monkeypatch.setattr("scmdm.sampling.sample_command.generate_divided", None)
    out = tmp_path / f"samples{suffix}"
    assert main(["sample", "configs/text/long-base", "num=1", f"out={out}"]) == 1
    assert str(out) in capsys.readouterr().err and not out.exists()


def test_samples_of_several_lines_are_counted_in_a_file_of_lines(tmp_path, capsys):
    out = tmp_path / "samples.txt"
    assert main(["sample", "configs/text/long-base", "num=3", "sampler.steps=4", f"out={out}"]) == 0
    assert len(out.read_text().splitlines()) > 3 and "where 3 " in capsys.readouterr().err
