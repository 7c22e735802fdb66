"""Real processes on gloo: neither the number of ranks, nor the mesh, nor an interruption changes what is computed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from scmdm.cli import main
from scmdm.model.weights import weights_of
from scmdm.training.checkpoint import find_model, newest_checkpoint
from scmdm.training.metrics import read_metrics
from tests.conftest import ADAPTED

pytestmark = pytest.mark.slow
STEPS = 20


def command(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *launcher, "-m", "scmdm", *map(str, arguments)]


def start(processes, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(processes, *arguments),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(processes, *arguments):
    """Run to the end; returns the exit status and the output."""
    process = start(processes, *arguments)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


@pytest.fixture(scope="module")
def adapt(base, molecules, empty_yaml):
    """The arguments of an adaptation whose learning rate does not depend on its length."""

    def arguments(run, *overrides):
        keys = [f"run_dir={run}", f"base={base}", f"data.path={molecules}", *ADAPTED, "precision=float32"]
        fixed = ["self_conditioning.rate=0.5", "optimizer.lr=1e-2", f"train.steps={STEPS}"]
        return ["adapt", str(empty_yaml), *keys, *fixed, *overrides]

    return arguments


@pytest.fixture(scope="module")
def single(tmp_path_factory, adapt):
    run = tmp_path_factory.mktemp("runs") / "single"
    assert main(adapt(run, "train.micro_batch_size=64")) == 0
    return run


def rows(run):
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]


def assert_same(run, single):
    """The same losses, gradient norms, weights and averages, to float tolerance."""
    ours, theirs = rows(run), rows(single)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), a["step"]
        assert (a["tokens"], a["evaluations"]) == (b["tokens"], b["evaluations"])
    for kind in ("ema", "raw"):
        found, expected = (weights_of(find_model(path), weights=kind) for path in (run, single))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (0, ["train.micro_batch_size=16"]),
        (0, ["engine=fsdp2", "train.micro_batch_size=32"]),
        (2, ["train.micro_batch_size=32", "model.activation_checkpointing=full"]),
        (2, ["train.micro_batch_size=8", "fsdp.reshard_after_estimate=true"]),
        (4, ["train.micro_batch_size=16", "model.activation_checkpointing=selective"]),
        (4, ["train.micro_batch_size=8", "fsdp.replicate=2"]),
    ],
)
def test_losses_and_weights_do_not_depend_on_the_split(processes, overrides, adapt, single, tmp_path):
    status, output = launch(processes, *adapt(tmp_path / "run", *overrides))
    assert status == 0, output
    assert_same(tmp_path / "run", single)


def test_the_number_of_ranks_may_change_at_every_restart(adapt, single, tmp_path):
    """1 -> 2 -> 4 -> 1 in mid-epoch (an epoch is 11 steps), with other engines: the same samples, noise and losses."""
    for processes, steps in ((0, 6), (2, 9), (4, 15), (0, STEPS)):
        status, output = launch(
            processes, *adapt(tmp_path / "run", "train.micro_batch_size=16", f"train.steps={steps}")
        )
        assert status == 0, output
    assert_same(tmp_path / "run", single)


def workers(process):
    """The ranks that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if "torch.distributed.run" not in open(f"/proc/{pid}/cmdline").read()]


def wait_for_step(process, run, step):
    deadline = time.monotonic() + 120
    while not (found := rows(run)) or found[-1]["step"] < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_rank_ends_the_run_and_the_resumed_one_is_bit_identical(adapt, tmp_path):
    arguments = [*adapt(tmp_path / "whole", "train.micro_batch_size=32")]
    assert launch(2, *arguments)[0] == 0
    arguments = [*adapt(tmp_path / "killed", "train.micro_batch_size=32")]
    process = start(2, *arguments)
    wait_for_step(process, tmp_path / "killed", 8)
    os.kill(workers(process)[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    status, output = launch(2, *arguments)
    assert status == 0 and "resuming from" in output, output
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in whole] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in killed
    ]
    for kind in ("ema", "raw"):
        ours, theirs = (weights_of(find_model(tmp_path / run), weights=kind) for run in ("whole", "killed"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(adapt, single, tmp_path):
    run = tmp_path / "run"
    arguments = adapt(run, "train.micro_batch_size=32", "train.checkpoint_every=1000")
    process = start(2, *arguments)
    wait_for_step(process, run, 5)
    os.kill(workers(process)[-1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert "stopped by SIGUSR1 at step" in output
    checkpoint = newest_checkpoint(run / "checkpoints")[0]
    assert json.loads((checkpoint / "state.json").read_text())["step"] == rows(run)[-1]["step"] < STEPS
    assert launch(2, *arguments)[0] == 0
    assert_same(run, single)


@pytest.mark.parametrize(
    ("processes", "overrides", "message"),
    [
        (2, ["engine=single"], "engine=single, but there are 2 processes"),
        (2, ["train.micro_batch_size=64"], "a multiple of 2 x train.micro_batch_size = 128"),
        (2, ["fsdp.replicate=3"], "fsdp.replicate=3 is not possible; it must divide the 2 processes"),
    ],
)
def test_impossible_splits_stop_at_the_start(processes, overrides, message, adapt, tmp_path):
    status, output = launch(processes, *adapt(tmp_path / "run", *overrides))
    assert status != 0 and message in output, output
    assert not (tmp_path / "run" / "checkpoints").exists()
