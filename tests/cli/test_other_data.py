"""Data that was not made for a model is refused, with the reason."""

import pytest

from scmdm.cli import main
from tests.conftest import ADAPTED, prepare_qm9


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    out = tmp_path_factory.mktemp("longer") / "qm9"
    assert prepare_qm9(out, "length=40") == 0
    return out


def adapt(empty_yaml, base, data, run, *keys):
    given = [
        f"base={base}",
        f"data.path={data}",
        f"run_dir={run}",
        "train.steps=1",
        *ADAPTED,
        "schedule.warmup_steps=1",
    ]
    return main(["adapt", str(empty_yaml), *given, *keys])


def test_another_length_is_refused_unless_it_is_meant(base, longer, empty_yaml, tmp_path, capsys):
    assert adapt(empty_yaml, base, longer, tmp_path / "run") != 0
    told = capsys.readouterr().err
    assert "samples of length 40" in told and "length 24" in told and "any_length=true" in told

    assert adapt(empty_yaml, base, longer, tmp_path / "run", "any_length=true") == 0


def test_a_model_is_not_measured_on_another_length(base, longer, capsys):
    assert main(["evaluate", str(base), f"data={longer}"]) != 0
    told = capsys.readouterr().err
    assert "length 40" in told and "length 24" in told


def test_another_tokenizer_is_refused(base, tmp_path, empty_yaml, capsys):
    assert prepare_qm9(tmp_path / "selfies", "tokenizer.name=selfies") == 0
    assert adapt(empty_yaml, base, tmp_path / "selfies", tmp_path / "run") != 0
    assert "prepare the data with the base's tokenizer" in capsys.readouterr().err


def test_a_model_that_has_never_seen_bos_masked_is_not_adapted_to_data_that_mask_it(base, tmp_path, empty_yaml, capsys):
    assert prepare_qm9(tmp_path / "masked", "bos_policy=loss") == 0
    assert adapt(empty_yaml, base, tmp_path / "masked", tmp_path / "run") != 0
    assert "bos_policy=given" in capsys.readouterr().err and not (tmp_path / "run").exists()
