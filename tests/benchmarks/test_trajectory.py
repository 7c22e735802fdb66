"""The curves of denoising: the integrand's mean is the NELBO, and the last guesses are the samples'."""

import json

import pytest

from benchmarks.trajectory import follow, integrand, main
from scmdm.data.manifest import Manifest
from scmdm.evaluation.divided_nelbo import NelboSettings, divided_nelbo
from scmdm.sampling.model_loading import load
from scmdm.training.validation import ValidationSet


def test_the_mean_of_the_integrand_is_the_nelbo(base, molecules):
    loaded = load(base)
    nats = integrand(loaded, molecules, num=64, condition=False)
    held_out = ValidationSet.at(molecules, "test", Manifest.read(molecules), 64)
    nelbo = divided_nelbo(loaded, held_out, NelboSettings(draws=32), condition=False)
    assert sum(nats) / len(nats) == pytest.approx(nelbo.mean, rel=0.1)


def test_samples_are_followed_to_their_last_mask(base):
    t, entropy, settled = follow(load(base), steps=4, num=8)
    assert t == [1.0, 0.75, 0.5]  # the last step leaves no mask
    assert len(entropy) == len(settled) == 3
    assert all(value > 0 for value in entropy) and all(0 <= value <= 1 for value in settled)


@pytest.mark.parametrize("models", [["base"], ["base="], ["a=x", "a=y"]])
def test_models_without_a_label_of_their_own(tmp_path, capsys, models):
    with pytest.raises(SystemExit) as ended:
        main([*models, "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and repr(models[-1]) in capsys.readouterr().err


def test_a_figure_and_its_values_are_written(base, molecules, tmp_path):
    arguments = [f"base={base}", "--data", str(molecules), "--out", str(tmp_path), "--num", "8", "--steps", "4"]
    assert main(arguments) == 0
    assert (tmp_path / "trajectory.png").stat().st_size > 0
    curves = json.loads((tmp_path / "trajectory.json").read_text())["curves"]["base"]
    assert len(curves["t"]) == len(curves["null"]) == 16 and curves["conditioned"] == []
