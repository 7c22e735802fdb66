"""Asynchronous saves, retention, and disks that are full for a while."""

import json
import resource
import shutil

import pytest
import safetensors
import torch

from scmdm.checkpoint.reader import checkpoint_name, find_model, list_checkpoints
from scmdm.checkpoint.retention import remove_old_checkpoints
from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.checkpoint.writer import CheckpointWriter, Snapshot
from scmdm.cli import main
from scmdm.config.training import TrainConfig
from scmdm.distributed.engine import SingleEngine
from scmdm.errors import InUseError
from scmdm.observability.run_metrics import read_metrics
from scmdm.system.lease import acquire
from tests.conftest import TINY, scmdm
from tests.processes import wait_until


def arguments(run, molecules, config, *overrides):
    return ["train", str(config), f"run_dir={run}", f"data.path={molecules}", *TINY, *overrides]


def names(run):
    return [int(path.name[5:]) for path in list_checkpoints(run / "checkpoints")]


def tensors(checkpoint):
    """Every tensor's bytes by file and name, because safetensors does not fix the order in its header."""
    files = {path.name: safetensors.deserialize(path.read_bytes()) for path in (checkpoint / "tensors").iterdir()}
    return {(file, name): bytes(entry["data"]) for file, entries in files.items() for name, entry in entries}


def test_an_asynchronous_save_stores_the_step_at_which_it_was_requested(molecules, empty_yaml, tmp_path):
    """The weights change while the checkpoint is written."""
    for run, key in (("a", "true"), ("b", "false")):
        keys = ("train.steps=8", "train.checkpoint_every=2", "train.keep_last=9", f"train.async_checkpoint={key}")
        assert main(arguments(tmp_path / run, molecules, empty_yaml, *keys)) == 0
    assert names(tmp_path / "a") == names(tmp_path / "b") == [2, 4, 6, 8]
    for ours, theirs in zip(*(list_checkpoints(tmp_path / run / "checkpoints") for run in "ab"), strict=True):
        assert verify_checkpoint(ours) == []
        assert tensors(ours) == tensors(theirs)
        states = [json.loads((path / "state.json").read_text()) for path in (ours, theirs)]
        assert all(states[0][key] == states[1][key] for key in ("step", "tokens", "ema_updates", "loader", "loss_sum"))


@pytest.mark.parametrize(
    ("keys", "best", "kept"),
    [
        ({"keep_last": 2}, 30, [60, 70]),
        ({"keep_last": 1, "keep_every": 20}, 30, [20, 40, 60, 70]),
        ({"keep_last": 1, "keep_best": True}, 30, [30, 70]),
        ({"keep_last": 1, "keep_best": True}, None, [70]),
        ({"keep_last": 9}, None, [10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_retention(tmp_path, keys, best, kept):
    """80 comes after the newest: the resume skipped it as damaged."""
    for step in range(10, 90, 10):
        (tmp_path / checkpoint_name(step)).mkdir()
    remove_old_checkpoints(tmp_path, tmp_path / checkpoint_name(70), TrainConfig(steps=70, **keys), best)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in kept]
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_the_best_checkpoint_has_the_lowest_validation_nelbo(molecules, empty_yaml, tmp_path):
    """The learning rate grows until it ruins the model, so that the best checkpoint is not the last."""
    keys = ["train.steps=12", "train.checkpoint_every=2", "train.validate_every=2", "train.validation_samples=64"]
    keys += ["train.keep_last=1", "train.keep_best=true", "optimizer.lr=1", "optimizer.clip=0", "ema.decay=0"]
    keys += ["schedule.warmup_steps=12"]
    assert main(arguments(tmp_path / "run", molecules, empty_yaml, *keys)) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "validation"]
    best = min(rows, key=lambda row: row["nelbo_null"])["step"]
    assert best < 12, rows
    assert names(tmp_path / "run") == [best, 12]
    state = json.loads((find_model(tmp_path / "run") / "state.json").read_text())
    assert state["best_step"] == best


def wait_for(run, text, process):
    log = run / "train.log"
    wait_until(lambda: log.exists() and text in log.read_text(), process)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_disk_that_is_full_for_a_while(molecules, empty_yaml, tmp_path, asynchronous):
    """At first the kernel limits files to 64 KiB (EFBIG, an OSError like ENOSPC); then the limit is lifted."""
    run = tmp_path / "run"
    keys = ["train.steps=400", "train.checkpoint_every=4", "train.on_save_error=continue"]
    process = scmdm(
        *arguments(run, molecules, empty_yaml, *keys, f"train.async_checkpoint={asynchronous}"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY)),
    )
    wait_for(run, "continuing with the previous checkpoint", process)
    assert names(run) == [] and "free space" in (run / "train.log").read_text()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wait_for(run, "saved ", process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 85 and verify_checkpoint(find_model(run)) == []


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("moment", ["before the save", "while the files are written", "and they are removed"])
def test_nothing_is_committed_after_the_lease_was_taken_over(tmp_path, asynchronous, moment):
    """Whatever `train.on_save_error` says."""
    checkpoints = tmp_path / "checkpoints"
    config = TrainConfig(async_checkpoint=asynchronous, on_save_error="continue")
    engine = SingleEngine(torch.nn.Linear(1, 1), None, torch.device("cpu"), torch.float32)
    tensors = {"weights.a": torch.ones(2)}

    def take_over(directory=None):
        if directory is not None and moment == "and they are removed":
            shutil.rmtree(directory)
        if "00000002.json" not in {path.name for path in (tmp_path / "lease").iterdir()}:
            (tmp_path / "lease" / "00000002.json").write_text("{}")

    with acquire(tmp_path / "lease", "run_dir=x") as lease:
        writer = CheckpointWriter(checkpoints, engine, config, lease.fence)
        writer.save(Snapshot(1, None, tensors, lambda directory: None))
        writer.finish()
        if moment == "before the save":
            take_over()

        def save():
            writer.save(Snapshot(2, None, tensors, take_over))
            writer.finish()

        with pytest.raises(InUseError, match="run_dir=x was taken over"):
            save()
    assert [path.name for path in checkpoints.iterdir() if path.name != "latest"] == [checkpoint_name(1)]
    assert (checkpoints / "latest").read_text() == f"{checkpoint_name(1)}\n"


@pytest.mark.slow
def test_the_last_save_must_succeed(molecules, empty_yaml, tmp_path):
    process = scmdm(
        *arguments(tmp_path / "run", molecules, empty_yaml, "train.steps=4", "train.on_save_error=continue"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("scmdm: error: cannot write") and "Traceback" not in errors
    assert names(tmp_path / "run") == []
