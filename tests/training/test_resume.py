"""Kills and signals do not change results; a resume refuses other settings, data and bases."""

import json
import random
import shutil
import signal

import pytest
import yaml

from scmdm.checkpoint.reader import find_model, list_checkpoints, newest_checkpoint
from scmdm.checkpoint.seal import seal
from scmdm.cli import main
from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.errors import UserError
from scmdm.training.setup import check_same_run
from scmdm.training.trainer import REQUEUE_EXIT
from tests import kills
from tests.conftest import TINY, scmdm
from tests.kills import assert_same_run, train_rows

STEPS = 40  # of 64 samples; the training split has about 760, so an epoch is 11 steps and kills fall in mid-epoch


def adapt_arguments(run, base, molecules, config, *overrides):
    return kills.adapt_arguments(run, base, molecules, config, f"train.steps={STEPS}", *overrides)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base, molecules, empty_yaml):
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(adapt_arguments(run, base, molecules, empty_yaml)) == 0
    rows = train_rows(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return run


@pytest.mark.slow
def test_sigkill_at_random_steps_changes_no_result(tmp_path, base, molecules, empty_yaml, uninterrupted):
    arguments = adapt_arguments(tmp_path / "killed", base, molecules, empty_yaml)
    met = kills.kill_until_done(arguments, tmp_path / "killed", 0, 3, random.Random(0), life_s=0.1)
    assert met["kills"] >= 1
    assert_same_run(tmp_path / "killed", uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_asks_for_a_requeue(tmp_path, base, molecules, empty_yaml, uninterrupted):
    run = tmp_path / "stopped"
    arguments = adapt_arguments(run, base, molecules, empty_yaml, "train.checkpoint_every=1000")
    process = scmdm(*arguments)
    kills.wait_for_step(process, run, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE_EXIT
    assert "stopped by SIGTERM" in output
    assert newest_checkpoint(run / "checkpoints")[0] is not None
    assert main(arguments) == 0
    assert_same_run(run, uninterrupted)


def test_same_seed_same_run_other_seed_other_run(tmp_path, base, molecules, empty_yaml, uninterrupted):
    assert main(adapt_arguments(tmp_path / "again", base, molecules, empty_yaml)) == 0
    assert_same_run(tmp_path / "again", uninterrupted)
    assert main(adapt_arguments(tmp_path / "other", base, molecules, empty_yaml, "seed=1", "train.steps=3")) == 0
    assert train_rows(tmp_path / "other")[0]["loss"] != train_rows(uninterrupted)[0]["loss"]


def test_a_finished_run_is_not_changed(uninterrupted, base, molecules, empty_yaml, capsys):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    written = (uninterrupted / "environment.json").stat().st_mtime_ns
    assert main(adapt_arguments(uninterrupted, base, molecules, empty_yaml)) == 0
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
    assert (uninterrupted / "environment.json").stat().st_mtime_ns == written
    assert f"already at step {STEPS}" in (uninterrupted / "train.log").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0.1", "optimizer.lr=0.1, but run_dir="),
        ("self_conditioning.passes=2", "self_conditioning.passes=2, but run_dir="),
        ("seed=7", "seed=7, but run_dir="),
    ],
)
def test_resuming_with_other_settings_is_refused(uninterrupted, base, molecules, empty_yaml, capsys, override, message):
    assert main(adapt_arguments(uninterrupted, base, molecules, empty_yaml, override)) == 1
    error = capsys.readouterr().err
    assert message in error and "another run_dir" in error and error.count("\n") == 1


def test_a_run_from_before_a_key_existed_resumes(uninterrupted, tmp_path):
    """The missing key had the effect of its default."""
    recorded = yaml.safe_load((find_model(uninterrupted) / "config.yaml").read_text())
    config = load_config(RunConfig, find_model(uninterrupted) / "config.yaml", [])
    del recorded["optimizer"]["weight_decay"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    check_same_run(config, tmp_path)
    config.optimizer.weight_decay = 0.1
    with pytest.raises(UserError, match=r"optimizer\.weight_decay=0\.1, but .* started with 0\.0"):
        check_same_run(config, tmp_path)


def test_a_run_that_stored_a_key_which_is_gone_resumes_if_it_behaves_the_same(uninterrupted, tmp_path):
    recorded = yaml.safe_load((find_model(uninterrupted) / "config.yaml").read_text())
    config = load_config(RunConfig, find_model(uninterrupted) / "config.yaml", [])
    for value in ("same_state", "noisier_state"):
        recorded["self_conditioning"]["estimate_from"] = value
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
        if value == "same_state":
            check_same_run(config, tmp_path)
    with pytest.raises(UserError, match=r"self_conditioning\.estimate_from=.*'noisier_state'"):
        check_same_run(config, tmp_path)


def test_a_run_that_stored_a_key_without_effect_resumes(uninterrupted, tmp_path):
    """Such values were accepted once, and a change of the engine leaves them behind."""
    recorded = yaml.safe_load((find_model(uninterrupted) / "config.yaml").read_text())
    config = load_config(RunConfig, find_model(uninterrupted) / "config.yaml", [])
    assert config.self_conditioning.rollout_steps == 0
    recorded["self_conditioning"]["rollout_span"] = 0.5
    recorded["deepspeed"]["stage"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    check_same_run(config, tmp_path)
    recorded["self_conditioning"]["rollout_steps"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    with pytest.raises(UserError, match=r"self_conditioning\.rollout_steps=0"):
        check_same_run(config, tmp_path)


def test_another_base_is_refused(uninterrupted, molecules, empty_yaml, capsys):
    assert main(adapt_arguments(uninterrupted, uninterrupted, molecules, empty_yaml)) == 1
    assert "is not the model that" in capsys.readouterr().err


def test_a_finished_run_continues_with_more_steps(tmp_path, base, molecules, empty_yaml):
    """At a constant rate a longer run equals a run of that length from the start."""
    short = adapt_arguments(tmp_path / "a", base, molecules, empty_yaml, "schedule.kind=constant", "train.steps=7")
    assert main(short) == 0
    assert main([*short, "train.steps=12"]) == 0
    longer = adapt_arguments(tmp_path / "b", base, molecules, empty_yaml, "schedule.kind=constant", "train.steps=12")
    assert main(longer) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_wandb_offline_keeps_its_id(tmp_path, base, molecules, empty_yaml):
    run = tmp_path / "tracked"
    arguments = adapt_arguments(run, base, molecules, empty_yaml, "wandb.mode=offline", "train.steps=3")
    assert main(arguments) == 0
    first = json.loads((find_model(run) / "state.json").read_text())["wandb_id"]
    assert first and len(list((run / "wandb").glob(f"offline-run-*-{first}"))) == 1
    assert main([*arguments, "train.steps=6", "schedule.steps=6"]) == 0
    assert json.loads((find_model(run) / "state.json").read_text())["wandb_id"] == first


def rates(run):
    return [row["lr"] for row in train_rows(run)]


def test_a_resume_moves_the_end_of_a_decay_only_by_name(tmp_path, base, molecules, empty_yaml, capsys):
    """With train.steps alone the learning rate would jump; the run directory stays as it was."""
    run = tmp_path / "run"
    short = adapt_arguments(run, base, molecules, empty_yaml, "train.steps=8")
    assert main(short) == 0
    before = (run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes()
    capsys.readouterr()
    for steps in (6, 12):
        assert main([*short, f"train.steps={steps}"]) == 1
        error = capsys.readouterr().err
        assert all(name in error for name in (f"train.steps={steps}", "schedule.steps=8", f"schedule.steps={steps}"))
        assert error.count("\n") == 1
    assert before == ((run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes())

    assert main([*short, "train.steps=12", "schedule.steps=8"]) == 0
    assert rates(run)[8:] == [0.0] * 4
    assert main([*short, "train.steps=16", "schedule.steps=16"]) == 0
    assert "schedule.steps=16" in (run / "train.log").read_text()
    whole = tmp_path / "whole"
    assert main(adapt_arguments(whole, base, molecules, empty_yaml, "train.steps=16")) == 0
    assert rates(run)[12:] == rates(whole)[12:] and rates(run)[:8] != rates(whole)[:8]
    assert main([*short, "train.steps=16"]) == 0  # as it was left


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["schedule.kind=constant", "schedule.steps=5"], "schedule.steps=5"),
        (["schedule.warmup_steps=5", "schedule.steps=4"], "schedule.steps=4"),
        (["schedule.steps=0"], "schedule.steps=0"),
    ],
)
def test_an_impossible_end_of_a_decay(tmp_path, base, molecules, empty_yaml, capsys, keys, named):
    assert main(adapt_arguments(tmp_path / "run", base, molecules, empty_yaml, *keys)) == 1
    assert named in capsys.readouterr().err


def test_a_run_from_before_the_key_of_the_end_resumes(uninterrupted, base, molecules, empty_yaml, tmp_path, capsys):
    """Its decay ended at train.steps."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    for checkpoint in list_checkpoints(run / "checkpoints"):
        text = (checkpoint / "config.yaml").read_text()
        assert "\n  steps: null\n" in text
        (checkpoint / "config.yaml").write_text(text.replace("\n  steps: null\n", "\n"))
        (checkpoint / "checkpoint.json").unlink()
        seal(checkpoint)
    assert main(adapt_arguments(run, base, molecules, empty_yaml, "train.steps=50")) == 1
    assert f"schedule.steps={STEPS}" in capsys.readouterr().err
    assert main(adapt_arguments(run, base, molecules, empty_yaml)) == 0


def test_the_best_checkpoint_is_only_compared_with_equal_validations(tmp_path, molecules, empty_yaml, capsys):
    keys = ["train.validate_every=2", "train.checkpoint_every=2", "train.keep_best=true", "train.steps=2"]
    run = ["train", str(empty_yaml), f"run_dir={tmp_path / 'run'}", f"data.path={molecules}", *TINY, *keys]
    assert main([*run, "train.validation_samples=16"]) == 0
    assert main([*run, "train.steps=4", "train.validation_samples=32"]) == 1
    error = capsys.readouterr().err
    assert "train.validation_samples=32" in error and "train.keep_best" in error and error.count("\n") == 1
    assert main([*run, "train.steps=4", "train.validation_samples=32", "train.keep_best=false"]) == 0
