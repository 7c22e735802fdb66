"""`scmdm launch local`, and the signals that reach a whole process tree, as SLURM sends them."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from scmdm.checkpoint.reader import newest_checkpoint
from scmdm.system.signals import REQUEUE_EXIT
from tests.conftest import scmdm
from tests.distributed.launching import torchrun
from tests.kills import adapt_arguments, last_step, train_rows, wait_for_step
from tests.processes import descendants, wait_until

pytestmark = pytest.mark.slow
STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base, molecules, empty_yaml):
    run = tmp_path_factory.mktemp("runs") / "whole"
    status, output = torchrun(2, *adapt_arguments(run, base, molecules, empty_yaml, f"train.steps={STEPS}"))
    assert status == 0, output
    return run


@pytest.fixture
def local(tmp_path, base, molecules, empty_yaml):
    """Starts the run on two ranks."""

    def start(*overrides, options=()):
        keys = [f"train.steps={STEPS}", *overrides]
        arguments = adapt_arguments(tmp_path / "run", base, molecules, empty_yaml, *keys)
        return scmdm("launch", "local", *arguments, "--ranks-per-node", "2", *options)

    return start


def ranks_of(launcher):
    found = []
    for pid in descendants(launcher):
        with contextlib.suppress(OSError):
            if b"adapt" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_a_local_launch_matches_torchrun_and_keeps_the_logs_of_each_rank(local, tmp_path, undisturbed):
    process = local()
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert train_rows(tmp_path / "run") == train_rows(undisturbed)
    logs = [path for path in (tmp_path / "run/launch").rglob("stdout.log") if path.stat().st_size]
    assert len(logs) == 1 and "step 40/40" in logs[0].read_text(), "rank 0's; the other had nothing to say"
    assert f"[rank 0] {logs[0].read_text().splitlines()[0]}" in output


@pytest.mark.parametrize("whom", ["launcher", pytest.param("everybody", marks=pytest.mark.long)])
def test_a_signal_saves_and_the_next_launch_continues(local, tmp_path, undisturbed, whom):
    """`everybody` includes loader processes and wandb's service, which dies; the save must succeed all the same."""
    keys = ("train.checkpoint_every=1000", "data.num_workers=1", "wandb.mode=offline")
    process = local(*keys)
    wait_for_step(process, tmp_path / "run", 5)
    for pid in [*reversed(descendants(process.pid)), process.pid] if whom == "everybody" else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == REQUEUE_EXIT, output + errors
    assert "stopped by SIGTERM at step" in output
    assert ("wandb failed" in output) <= (whom == "everybody")
    checkpoint, _ = newest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None and checkpoint.name == f"step_{last_step(tmp_path / 'run'):08}"
    again = local(*keys)
    assert again.wait(timeout=600) == 0, again.communicate()
    assert train_rows(tmp_path / "run") == train_rows(undisturbed)
    assert len({path.name.rpartition("-")[2] for path in (tmp_path / "run/wandb").glob("offline-run-*")}) == 1


@pytest.mark.long
def test_a_signal_during_start_up_is_not_lost(local, tmp_path):
    process = local()
    for pid in wait_until(lambda: len(ranks := ranks_of(process.pid)) >= 2 and ranks, process):
        os.kill(pid, signal.SIGUSR1)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == REQUEUE_EXIT, output + errors
    assert "stopped by SIGUSR1 before the first step" in output
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.long
def test_a_rank_that_dies_is_reported_and_the_next_attempt_continues(local, tmp_path, undisturbed):
    process = local(options=("--attempts", "2"))
    wait_for_step(process, tmp_path / "run", 12)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, output + errors
    assert re.search(r"scmdm: ranks failed on \S+: .*rank [01]: killed by SIGKILL", errors)
    assert "resuming from" in output and train_rows(tmp_path / "run") == train_rows(undisturbed)


def test_samples_and_an_export_are_launched(tmp_path, base):
    """With the arguments that the commands have; nothing is left beside what they write but their launches."""
    model, out = tmp_path / "an export", tmp_path / "50% samples.jsonl"
    for arguments in (
        ["export", base, model],
        ["sample", model, "num=4", "sampler.steps=2", f"out={out}", "device=cpu"],
    ):
        process = scmdm("launch", "local", *arguments)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
    assert len(out.read_text().splitlines()) == 4 and (model / "model.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in (model, out)),
        *(f"{path.name}.launch" for path in (model, out)),
    }
