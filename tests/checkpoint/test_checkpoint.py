"""Checkpoints: detection of every kind of damage, fallback, retention, full disk, export."""

import contextlib
import json
import resource
import shutil

import pytest
import torch
import yaml

import scmdm
from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import find_model, list_checkpoints, newest_checkpoint
from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.cli import main
from scmdm.errors import UserError
from scmdm.models.model_files import read_model
from tests.conftest import ADAPTED, TINY
from tests.conftest import scmdm as start


@pytest.fixture
def run(base, tmp_path):
    """A copy of the base's run, to damage: checkpoints at steps 5 and 6."""
    shutil.copytree(base, tmp_path / "run")
    return tmp_path / "run"


def newest(run):
    return list_checkpoints(run / "checkpoints")[-1]


def tensors(checkpoint):
    """The one file of tensors that one rank writes."""
    (path,) = (checkpoint / "tensors").iterdir()
    return path


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "remove": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_reported_and_the_previous_checkpoint_used(run, damage):
    checkpoint = newest(run)
    for name in sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()):
        saved = (checkpoint / name).read_bytes()
        DAMAGES[damage](checkpoint / name)
        problems = verify_checkpoint(checkpoint)
        assert problems and name in problems[0]
        found, skipped = newest_checkpoint(run / "checkpoints")
        assert found == list_checkpoints(run / "checkpoints")[-2]
        assert checkpoint.name in skipped[0] and name in skipped[0]
        (checkpoint / name).write_bytes(saved)
    assert verify_checkpoint(checkpoint) == []


def test_resume_falls_back_with_a_warning(run, molecules, empty_yaml):
    flip(tensors(newest(run)))
    arguments = ["train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", *TINY, "train.steps=8"]
    assert main(arguments) == 0
    log = (run / "train.log").read_text()
    assert "skipped step_00000006: " in log and "safetensors does not match its SHA-256" in log
    assert "resuming from" in log and "step_00000005" in log


def train(run, molecules, config, *overrides):
    return main(["train", str(config), f"run_dir={run}", f"data.path={molecules}", *TINY, *overrides])


def test_a_new_checkpoint_is_kept_and_damaged_later_ones_are_removed(run, molecules, empty_yaml):
    """The resume falls back from step 6 to 5. A save at 6 replaces the damaged one, and one at 5 is not removed."""
    flip(tensors(newest(run)))
    shutil.copytree(newest(run), run / "checkpoints" / "step_00000009")
    shutil.copytree(newest(run), run / "checkpoints" / "step_00000010")
    assert train(run, molecules, empty_yaml, "train.steps=6", "train.keep_last=1") == 0
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000006"]
    assert find_model(run).name == "step_00000006"


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run, molecules, empty_yaml, capsys):
    for checkpoint in list_checkpoints(run / "checkpoints"):
        flip(tensors(checkpoint))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}
    assert train(run, molecules, empty_yaml, "train.steps=8") == 1
    assert "holds no" in capsys.readouterr().err
    assert before.items() <= {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}.items()


def test_leftovers_of_a_killed_save_are_removed(run, molecules, empty_yaml):
    for name in (".step_00000007.abc.tmp", ".step_00000005.removed", ".step_00000006.xyz.old"):
        (run / "checkpoints" / name).mkdir()
    assert train(run, molecules, empty_yaml, "train.steps=7") == 0
    assert all(path.name.startswith(("step_", "latest")) for path in (run / "checkpoints").iterdir())


def test_the_precision_of_auto_is_recorded_and_kept(run, molecules, empty_yaml, capsys):
    recorded = yaml.safe_load((run / "config.yaml").read_text())["precision"]
    assert recorded in ("float32", "bfloat16")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[recorded]
    assert train(run, molecules, empty_yaml, "train.steps=7", f"precision={other}") == 1
    assert f"precision='{other}', but run_dir=" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "step"), [("share", 5), ("full", 5), ("sizes", 6), ("descriptions", 6)])
def test_what_is_hashed_before_a_model_is_used(run, mode, step):
    flip(tensors(newest(run)))
    assert find_model(run, Verification(mode, weights="ema", together=True)).name == f"step_{step:08}"
    (newest(run) / "model.json").write_text((newest(run) / "model.json").read_text().replace("32", "33"))
    with pytest.raises(UserError) if mode == "sizes" else contextlib.nullcontext():
        read_model(find_model(run, Verification(mode, weights="ema")))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "step"), [("share", 5), ("sizes", 6)])
def test_an_adaptation_verifies_its_base_as_it_is_told(run, molecules, empty_yaml, tmp_path, mode, step):
    """The base is opened before its weights are hashed, and another time if they are damaged."""
    flip(tensors(newest(run)))
    keys = [f"run_dir={tmp_path / 'adapted'}", f"data.path={molecules}", f"base={run}", *ADAPTED]
    assert main(["adapt", str(empty_yaml), *keys, "train.steps=2", f"verify={mode}"]) == 0
    assert f"(step {step})" in (tmp_path / "adapted" / "train.log").read_text()


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(run, molecules, empty_yaml):
    """The kernel limits files to 64 KiB, like a full disk: EFBIG is an OSError like ENOSPC."""
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    arguments = ["train", empty_yaml, f"run_dir={run}", f"data.path={molecules}", *TINY, "train.steps=9"]
    process = start(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("scmdm: error: cannot write") and "free space" in errors
    assert "Traceback" not in errors
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


def test_export_samples_the_same_and_refuses_to_overwrite(base, tmp_path, capsys):
    out = tmp_path / "export"
    assert main(["export", str(base), str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "checkpoint.json",
        "manifest.json",
        "model.json",
        "tokenizer.json",
        "weights.safetensors",
    ]
    assert main(["checkpoint", "verify", str(out)]) == 0
    ours, theirs = scmdm.load(base), scmdm.load(out)
    parameters = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)
    assert main(["export", str(base), str(out)]) == 1
    assert "exists" in capsys.readouterr().err


def test_checkpoint_commands(run, capsys):
    assert main(["checkpoint", "list", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == ["step_00000005 ok", "step_00000006 ok"]
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("has no problems") == 2
    (newest(run) / "model.json").unlink()
    for path in (newest(run), run):
        assert main(["checkpoint", "verify", str(path)]) == 1
        assert "model.json is missing" in capsys.readouterr().err


def test_directories_without_a_model_are_refused(tmp_path, run):
    with pytest.raises(UserError, match="does not exist"):
        find_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no"):
        find_model(tmp_path)
    for checkpoint in list_checkpoints(run / "checkpoints"):
        flip(tensors(checkpoint))
    with pytest.raises(UserError, match=r"safetensors does not match"):
        find_model(run)


def test_an_adaptation_of_another_vocabulary_is_refused(base, tmp_path, empty_yaml, capsys):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("\n\n".join(f"Paragraph {i} of some plain text. " * 30 for i in range(300)))
    config = [
        "source.name=text",
        f"source.path={text}",
        "tokenizer.name=characters",
        "length=24",
        f"out={tmp_path / 'data'}",
    ]
    assert main(["prepare", str(empty_yaml), *config]) == 0
    keys = [f"run_dir={tmp_path / 'run'}", f"base={base}", f"data.path={tmp_path / 'data'}", "train.steps=2", *ADAPTED]
    assert main(["adapt", str(empty_yaml), *keys, "self_conditioning.rate=1"]) == 1
    error = capsys.readouterr().err
    assert "tokens" in error and "base=" in error and error.strip().count("\n") == 0
    assert json.loads((base / "checkpoints/step_00000006/state.json").read_text())["step"] == 6
