"""Ranks end when their launcher is killed."""

import signal

import pytest

from scmdm.checkpoint.reader import list_checkpoints, step_of
from scmdm.system.lease import read_lease
from scmdm.system.run_directory import CHECKPOINTS, LEASE
from tests.distributed.launching import are_gone, start, workers
from tests.kills import wait_for_step
from tests.processes import children

pytestmark = pytest.mark.slow


def test_ranks_save_and_end_when_torchrun_is_killed(adapt, tmp_path):
    run = tmp_path / "run"
    keys = ["train.steps=100000", "train.checkpoint_every=100000", "train.micro_batch_size=32", "data.num_workers=1"]
    process = start(2, *adapt(run, *keys))
    wait_for_step(process, run, 5)
    ranks = workers(process)
    loaders = [pid for rank in ranks for pid in children(rank)]
    assert len(ranks) == 2 and loaders
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert are_gone([*ranks, *loaders])
    (checkpoint,) = list_checkpoints(run / CHECKPOINTS)
    assert step_of(checkpoint) >= 5
    assert read_lease(run / LEASE)[1].released
