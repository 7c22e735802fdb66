"""SIGKILL at random moments, of one rank or of all, in the middle of saves, too:

    python -m tests.kills --kills 200 --processes 2

adapts a small model on QM9 with a save every two steps, kills it `--kills` times, and compares losses, weights, EMA and
moments with those of an undisturbed run: they must be equal bit for bit.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from scmdm.checkpoint.reader import find_model, list_checkpoints
from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.models.model_files import TENSORS
from scmdm.models.tensor_files import read_tensors, tensor_shapes
from scmdm.observability.run_metrics import last_row, read_metrics
from scmdm.system.run_directory import METRICS_FILE
from tests.conftest import ADAPTED, small_base
from tests.distributed.launching import launch, start, workers
from tests.processes import wait_until

KEPT_ROWS = ("step", "loss", "lr", "grad_norm", "tokens", "evaluations")
_START_UP_S = 6.0  # kills during start-up happen within this time
_LIFE_S = 0.8  # kills during training happen within this time after the first new step


def kill_until_done(arguments, run, processes, kills, dice, life_s=_LIFE_S):
    """Run, kill and resume `kills` times, then run to the end. Returns counts of the kills by kind."""
    met = Counter()
    while True:
        process = start(processes, *arguments)
        killed = met["kills"] < kills and _kill(process, run, dice, met, life_s)
        output, _ = process.communicate(timeout=240)
        if process.returncode == 0:
            return met
        if not killed:
            raise AssertionError(f"ended by itself with {process.returncode}:\n{output}")
        _examine(run, met)


def _kill(process, run, dice, met, life_s):
    """Kill one rank, or all and their launcher, at a random moment. Returns False if the run ended before."""
    in_start_up = dice.random() < 0.1
    if in_start_up:
        time.sleep(dice.random() * _START_UP_S)
    else:
        before = last_step(run)
        wait_until(lambda: process.poll() is not None or last_step(run) not in (before, 0))
        time.sleep(dice.random() * life_s)
    if process.poll() is not None:
        return False
    ranks = workers(process)
    if ranks and dice.random() < 0.5:
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(ranks), signal.SIGKILL)
        met["of one rank"] += 1
    else:
        for pid in (process.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        met["of all"] += 1
    met["kills"] += 1
    met["in start-up"] += in_start_up
    return True


def _examine(run, met):
    """After a kill there may be unfinished saves, but every checkpoint verifies."""
    place = run / "checkpoints"
    met["inside a save"] += any(place.glob(".step_*"))
    found = list_checkpoints(place)
    assert all(not verify_checkpoint(path) for path in found), found
    met["without any checkpoint yet"] += not found


def last_step(run):
    row = last_row(run / METRICS_FILE, "train")
    return row["step"] if row else 0


def wait_for_step(process, run, step):
    """Wait until a run that `process` trains has logged a step."""
    wait_until(lambda: last_step(run) >= step, process)


def train_rows(run):
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: row[key] for key in KEPT_ROWS} for row in rows if row["kind"] == "train"]


def final_tensors(run):
    checkpoint = find_model(run) / TENSORS
    found = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in tensor_shapes(checkpoint).items()}
    assert {name.split(".")[0] for name in found} == {"weights", "ema", "exp_avg", "exp_avg_sq"}
    read_tensors(checkpoint, found, alone=True)
    return found


def assert_same_run(one, other):
    """Assert that metrics and tensors are equal bit for bit."""
    assert train_rows(one) == train_rows(other)
    ours, theirs = final_tensors(one), final_tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def adapt_arguments(run, base, molecules, config, *overrides):
    keys = [f"run_dir={run}", f"base={base}", f"data.path={molecules}", *ADAPTED, *overrides]
    return ["adapt", str(config), "self_conditioning.rate=0.5", "model.dropout=0.1", "schedule.kind=cosine", *keys]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2, help="0: one process without torchrun")
    parser.add_argument("--steps", type=int, default=400, help="of a run; when it ends, the next one takes the kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        small_base(place)
        often = [f"train.steps={options.steps}", "train.checkpoint_every=2", "train.micro_batch_size=32"]

        def arguments(run):
            return adapt_arguments(run, place / "base", place / "qm9", place / "empty.yaml", *often)

        status, output = launch(options.processes, *arguments(place / "whole"), timeout=3600)
        assert status == 0, output
        started, dice, met = time.monotonic(), random.Random(options.seed), Counter()
        while met["kills"] < options.kills:
            run = place / f"run{met['runs']}"
            met += kill_until_done(arguments(run), run, options.processes, options.kills - met["kills"], dice)
            assert_same_run(run, place / "whole")
            met["runs"] += 1
            print(f"{time.monotonic() - started:.0f} s", dict(met), flush=True)
            shutil.rmtree(run)
    print(f"{max(1, options.processes)} process(es), runs of {options.steps} steps, saves every 2")
    for what, count in met.items():
        print(f"{count:6d} {what}")
    print("losses, weights, averages and moments are bit for bit those of the undisturbed run")


if __name__ == "__main__":
    main()
