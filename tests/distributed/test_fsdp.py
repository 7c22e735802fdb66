"""Real processes on gloo: neither the number of ranks, nor the mesh, nor an interruption changes what is computed."""

import json
import os
import random
import signal

import pytest

from scmdm.checkpoint.reader import newest_checkpoint
from scmdm.models.compilation import cpp_compiler
from tests import kills
from tests.conftest import TINY
from tests.data.preparation.test_packed import prepared
from tests.distributed.launching import launch, start, workers
from tests.distributed.parity import CASES, STEPS, assert_same, rows

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.long if "model.compile=block" in case.keys else ())
        for case in CASES
        if case.engine != "deepspeed"
    ],
    ids=str,
)
def test_losses_and_weights_do_not_depend_on_the_split(case, adapt, single, tmp_path):
    if "model.compile=block" in case.keys and cpp_compiler() is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU, and there is none")
    status, output = launch(case.processes, *adapt(tmp_path / "run", *case.overrides))
    assert status == 0, output
    assert_same(tmp_path / "run", single)


@pytest.mark.long
def test_the_number_of_ranks_may_change_at_every_restart(adapt, single, tmp_path):
    """1 -> 2 -> 4 -> 1 in mid-epoch (an epoch is 11 steps), on other engines and meshes: same samples, same losses."""
    for processes, steps, mesh in ((0, 6, []), (2, 9, []), (4, 15, ["fsdp.context=2"]), (0, STEPS, [])):
        keys = ["train.micro_batch_size=16", f"train.steps={steps}", *mesh]
        status, output = launch(processes, *adapt(tmp_path / "run", *keys))
        assert status == 0, output
    assert_same(tmp_path / "run", single)


def test_kills_of_one_rank_or_all_change_no_result(base, molecules, empty_yaml, tmp_path):
    """The short version of `python -m tests.kills`."""
    arguments = {
        run: kills.adapt_arguments(
            tmp_path / run, base, molecules, empty_yaml, "train.steps=60", "train.checkpoint_every=2"
        )
        for run in ("whole", "killed")
    }
    assert launch(2, *arguments["whole"])[0] == 0
    met = kills.kill_until_done(arguments["killed"], tmp_path / "killed", 2, 3, random.Random(1), life_s=0.2)
    assert met["kills"] >= 1
    kills.assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(adapt, single, tmp_path):
    run = tmp_path / "run"
    arguments = adapt(run, "train.micro_batch_size=32", "train.checkpoint_every=1000")
    process = start(2, *arguments)
    kills.wait_for_step(process, run, 5)
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
        (2, ["engine=single"], "engine=single"),
        (2, ["train.micro_batch_size=64"], "a multiple of 2 x train.micro_batch_size = 128"),
        (2, ["fsdp.replicate=3"], "fsdp.replicate=3 is not possible"),
        (
            3,
            ["fsdp.context=3", "train.micro_batch_size=8"],
            "fsdp.context=3 is not possible; it must divide model.heads",
        ),
    ],
)
def test_impossible_splits_stop_at_the_start(processes, overrides, message, adapt, tmp_path):
    status, output = launch(processes, *adapt(tmp_path / "run", *overrides))
    assert status != 0 and message in output, output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
@pytest.mark.parametrize("keys", [["engine=fsdp2"], ["engine=deepspeed", "deepspeed.stage=3"]], ids=" ".join)
def test_packed_documents_and_self_conditioning_on_two_ranks(keys, tmp_path, empty_yaml):
    lines = [json.dumps({"text": f"{number:03} " + "w" * (number % 37)}) for number in range(800)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepared(tmp_path / "a.jsonl", tmp_path / "data", empty_yaml, "framing=packed", "pad_policy=ignore")
    common = [f"data.path={tmp_path / 'data'}", *TINY, "precision=float32", f"train.steps={STEPS}"]
    for processes, name, engine in ((0, "single", ["engine=single"]), (2, "split", keys)):
        own = [f"run_dir={tmp_path / name}", "self_conditioning.rate=1", "optimizer.lr=3e-3", *engine]
        status, output = launch(processes, "train", str(empty_yaml), *common, *own)
        assert status == 0, output
    assert_same(tmp_path / "split", tmp_path / "single")
