"""Commands find a run and its data from any folder, and by any of the names that a user sees in it."""

import json
import shutil

import pytest

from scmdm.checkpoint.reader import find_model, list_checkpoints
from scmdm.cli import main
from scmdm.integrations.demo.server import recorded_base
from tests.conftest import ADAPTED, TINY

NAMES = ["", "checkpoints", "checkpoints/", "checkpoints/latest"]
EVALUATE = ["num=0", "nelbo_samples=4", "nelbo_draws=1", "split=validation"]


@pytest.fixture
def tree(base, molecules, tmp_path):
    """A project folder with a data set `qm9` and a run `run` that was started with relative paths."""
    shutil.copytree(molecules, tmp_path / "tree" / "qm9")
    return tmp_path / "tree"


@pytest.fixture
def run(tree, empty_yaml, monkeypatch):
    monkeypatch.chdir(tree)
    assert main(["train", str(empty_yaml), "run_dir=run", "data.path=qm9", "train.steps=2", *TINY]) == 0
    return tree / "run"


def test_the_data_of_a_run_is_found_from_another_folder(run, tree, tmp_path, monkeypatch, capsys):
    for place, name in ((run, "."), (run / "checkpoints", "latest"), (tmp_path, "tree/run")):
        monkeypatch.chdir(place)
        assert main(["evaluate", name, *EVALUATE]) == 0
    assert len(list((run / "evaluations").glob("*.json"))) == 1
    assert not (run / "checkpoints" / "evaluations").exists()
    tree.rename(tmp_path / "moved")
    assert main(["evaluate", "moved/run", *EVALUATE]) == 0
    (tmp_path / "moved" / "qm9").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["evaluate", "moved/run", *EVALUATE]) == 1
    error = capsys.readouterr().err
    assert "data.path=" in error and "data=" in error and error.count("\n") == 1
    assert main(["evaluate", "moved/run", "data=elsewhere", *EVALUATE]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_checkpoints_is_taken_for_its_run(base, name, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(base, run, ignore=shutil.ignore_patterns("evaluations"))
    path = f"{run}/{name}" if name else str(run)
    assert find_model(run / name).name == "step_00000006"
    assert main(["sample", path, "num=1", "sampler.steps=2"]) == 0
    assert main(["evaluate", path, *EVALUATE]) == 0
    assert len(list((run / "evaluations").iterdir())) == 1
    assert main(["export", path, str(tmp_path / "export")]) == 0
    assert main(["checkpoint", "list", path]) == 0
    assert main(["checkpoint", "verify", path]) == 0
    capsys.readouterr()
    assert main(["status", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert main(["report", path]) == 0
    assert (run / "report.html").exists()
    monkeypatch.chdir(run)
    if name:
        assert main(["sample", name, "num=1", "sampler.steps=2"]) == 0


def test_an_adaptation_starts_from_a_folder_of_checkpoints(base, molecules, empty_yaml, tmp_path):
    run = tmp_path / "run"
    keys = [f"run_dir={run}", f"base={base}/checkpoints", f"data.path={molecules}", "train.steps=2", *ADAPTED]
    assert main(["adapt", str(empty_yaml), "self_conditioning.rate=1", *keys]) == 0
    assert recorded_base(find_model(run)) == base / "checkpoints"


def test_damaged_checkpoints_in_a_folder_are_passed_over(base, tmp_path, caplog):
    shutil.copytree(base / "checkpoints", tmp_path / "copied")
    (list_checkpoints(tmp_path / "copied")[-1] / "model.json").write_text("{}")
    assert find_model(tmp_path / "copied").name == "step_00000005"
    assert any("step_00000006" in record.getMessage() for record in caplog.records)


def test_runs_may_stand_in_a_folder_called_checkpoints(base, tmp_path, capsys):
    run = tmp_path / "checkpoints" / "run"
    shutil.copytree(base, run, ignore=shutil.ignore_patterns("evaluations"))
    assert find_model(run).is_relative_to(run)
    assert main(["status", str(run)]) == 0
    assert main(["status", str(tmp_path / "checkpoints")]) == 1
    assert main(["evaluate", str(run), *EVALUATE]) == 0
    assert (run / "evaluations").is_dir() and not (tmp_path / "evaluations").exists()


def test_results_of_a_model_outside_of_a_run_go_to_the_working_directory(base, molecules, tmp_path, monkeypatch):
    """Into the model they would break its seal."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared").mkdir()
    assert main(["export", str(base), "shared/model"]) == 0
    before = sorted((tmp_path / "shared" / "model").rglob("*"))
    assert main(["evaluate", "shared/model", f"data={molecules}", *EVALUATE]) == 0
    assert sorted((tmp_path / "shared" / "model").rglob("*")) == before
    assert len(list((tmp_path / "evaluations" / "model").glob("*.json"))) == 1
    assert main(["checkpoint", "verify", "shared/model"]) == 0


@pytest.mark.parametrize("key", ["run_dir=", "run_dir= ", "base=", "data.path=", "run_dir=a\nb"])
def test_a_path_that_names_no_folder_is_refused(base, molecules, empty_yaml, tmp_path, monkeypatch, capsys, key):
    monkeypatch.chdir(tmp_path)
    keys = ["run_dir=x", f"base={base}", f"data.path={molecules}", "train.steps=1", *ADAPTED, key]
    assert main(["adapt", str(empty_yaml), *keys]) == 1
    error = capsys.readouterr().err
    assert key.partition("=")[0] in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", ["train", "adapt", "prepare", "study", "plan", "sample", "evaluate", "report", "status"]
)
def test_a_link_to_itself_is_refused(command, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert main([command, str(tmp_path / "loop")]) == 1
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and str(tmp_path / "loop") in captured


OWN_FILES = [
    (["report", "--out", "config.yaml"], "config.yaml"),
    (["report", "--out", "report.pdf"], ".html"),
    (["evaluate", *EVALUATE, "out=environment.json"], "environment.json"),
    (["evaluate", *EVALUATE, "out=numbers.txt"], ".json"),
    (["sample", "num=1", "sampler.steps=2", "out=metrics.jsonl"], "metrics.jsonl"),
    (["sample", "num=1", "sampler.steps=2", "out=folder.jsonl"], "folder.jsonl"),
]


@pytest.mark.parametrize(("arguments", "named"), OWN_FILES, ids=[named for _, named in OWN_FILES])
def test_no_output_replaces_a_file_of_a_run(run, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(run)
    (run / "folder.jsonl").mkdir()
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert main([arguments[0], ".", *arguments[1:]]) == 1
    assert named in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_does_not_begin_in_a_data_set(tree, empty_yaml, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    before = sorted((tree / "qm9").rglob("*"))
    assert main(["train", str(empty_yaml), "run_dir=qm9", "data.path=qm9", "train.steps=2", *TINY]) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert [path for path in sorted((tree / "qm9").rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]


def test_keys_behind_an_option_are_named_with_their_place(run, capsys, tmp_path):
    (tmp_path / "x.yaml").write_text("num: 1\n")
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--config", str(tmp_path / "x.yaml"), "sampler.steps=2"])
    assert "before the options" in capsys.readouterr().err


def test_an_evaluation_of_nothing_is_refused(run, capsys):
    assert main(["evaluate", str(run), "num=0", "nelbo_samples=0"]) == 1
    assert "nelbo_samples=0" in capsys.readouterr().err and not (run / "evaluations").exists()
