"""A rank of a run with expert parallelism is killed; the run goes on with other numbers of ranks and shares."""

import json
import os
import shutil
import signal

import pytest
import torch

from scmdm.checkpoint.reader import find_model, list_checkpoints, step_of
from scmdm.cli import main
from scmdm.models.safetensors_headers import read_header
from tests.distributed.launching import launch, start, workers
from tests.distributed.parity import rows
from tests.distributed.recorded_noise import recorded
from tests.distributed.test_expert_ranks import EXPERTS
from tests.kills import wait_for_step
from tests.weights import weights_of

pytestmark = [pytest.mark.slow, pytest.mark.long]
STEPS = 8


def kill_a_rank(process, run, after):
    """SIGKILL the second rank after a step; returns the last step that is stored."""
    wait_for_step(process, run, after)
    os.kill(workers(process)[1], signal.SIGKILL)
    process.communicate(timeout=240)
    return step_of(list_checkpoints(run / "checkpoints")[-1])


def stored_experts(checkpoint):
    """Rows of a stack of experts in each rank's file."""
    found = {}
    for path in sorted((checkpoint / "tensors").iterdir()):
        tensors = read_header(path).tensors
        if "exp_avg.blocks.1.experts.up.weight" in tensors:
            found[path.name] = tensors["exp_avg.blocks.1.experts.up.weight"].shape[0]
    return list(found.values())


def state_of(run):
    return json.loads((find_model(run) / "state.json").read_text())


def test_a_killed_run_goes_on_with_other_shares_of_the_experts(tmp_path, molecules, empty_yaml):
    """The same samples, noise and losses as those of a run of one process; then it is evaluated and exported.

    Samples and noise are equal bit for bit.
    """
    keys = [f"data.path={molecules}", *EXPERTS, "self_conditioning.rate=0.5", "precision=float32", "seed=3"]
    keys += ["train.global_batch_size=16", "optimizer.lr=3e-3", "ema.decay=0.9", "train.log_every=1"]
    keys += ["train.validate_every=0", f"train.steps={STEPS}", "train.checkpoint_every=2", "schedule.kind=constant"]
    keys += ["train.keep_last=9", "device=cpu"]

    def arguments(run, *own):
        return [tmp_path / f"{run}-noise", "train", str(empty_yaml), f"run_dir={tmp_path / run}", *keys, *own]

    recording = {"module": "tests.distributed.recorded_noise"}
    status, output = launch(0, *arguments("single", "train.micro_batch_size=16"), **recording)
    assert status == 0, output
    process = start(2, *arguments("killed", "train.micro_batch_size=4", "fsdp.experts=2"), **recording)
    stored = kill_a_rank(process, tmp_path / "killed", 3)
    assert 2 <= stored < STEPS
    newest = list_checkpoints(tmp_path / "killed/checkpoints")[-1]
    assert stored_experts(newest) == [4, 4]
    for kind in ("", "-noise"):
        shutil.copytree(tmp_path / f"killed{kind}", tmp_path / f"alone{kind}")
    for run, ranks, own in (
        ("killed", 4, ["train.micro_batch_size=2", "fsdp.experts=4"]),
        ("alone", 2, ["train.micro_batch_size=8"]),
    ):
        status, output = launch(ranks, *arguments(run, *own), **recording)
        assert status == 0, output
        compare(tmp_path / run, tmp_path / "single")
        noise = recorded(tmp_path / f"{run}-noise")
        assert len(noise) == STEPS * 16 and noise == recorded(tmp_path / "single-noise")
    assert stored_experts(find_model(tmp_path / "killed")) == [2, 2, 2, 2]
    used(tmp_path / "killed", tmp_path)
    adapted(tmp_path, empty_yaml, molecules)


def compare(run, single):
    ours, theirs = rows(run), rows(single)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]
    assert ours[-1]["tokens"] == theirs[-1]["tokens"]
    assert state_of(run)["loader"] == state_of(single)["loader"]  # the same samples; noise is keyed on them
    found, expected = weights_of(find_model(run)), weights_of(find_model(single))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


def used(run, place):
    assert main(["sample", str(run), "num=4", "sampler.steps=4", f"out={place / 'samples.jsonl'}"]) == 0
    few = ["num=4", "sampler.steps=4", "nelbo_samples=4", "nelbo_draws=1"]
    assert main(["evaluate", str(run), *few, f"out={place / 'evaluation.json'}"]) == 0
    assert main(["export", str(run), str(place / "export")]) == 0
    assert main(["checkpoint", "verify", str(place / "export")]) == 0
    found, expected = weights_of(place / "export"), weights_of(find_model(run))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def adapted(place, empty_yaml, molecules):
    """An adaptation from the export, with a frozen copy of it that makes the estimates."""
    keys = [f"base={place / 'export'}", f"data.path={molecules}", "self_conditioning.carried_from=base", "seed=4"]
    keys += ["self_conditioning.rate=0.5"]
    keys += ["train.global_batch_size=16", "train.steps=3", "train.log_every=1", "train.validate_every=0"]
    keys += ["precision=float32", "optimizer.lr=3e-3", "device=cpu"]
    for run, ranks, own in (
        ("adapted-single", 0, ["train.micro_batch_size=16"]),
        ("adapted", 2, ["train.micro_batch_size=8", "fsdp.experts=2"]),
    ):
        status, output = launch(ranks, "adapt", str(empty_yaml), f"run_dir={place / run}", *keys, *own)
        assert status == 0, output
    for a, b in zip(rows(place / "adapted"), rows(place / "adapted-single"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]
