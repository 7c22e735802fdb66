"""Jobs on a real SLURM of two nodes, started here: a run that was interrupted in any way continues identically."""

import dataclasses
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from scmdm.checkpoint.reader import newest_checkpoint
from scmdm.cli import main
from scmdm.errors import InUseError
from scmdm.system.lease import LeaseHolder, acquire, holder_lives
from scmdm.system.liveness import job_state
from tests.data.preparation.test_prepare import files
from tests.data.preparation.test_prepare_parallel import write_corpus
from tests.distributed.launching import torchrun
from tests.kills import adapt_arguments
from tests.slurm import cluster
from tests.slurm.cluster import saved_state, slurm, steps_and_losses, submit, wandb_ids

pytestmark = pytest.mark.slow
PORT = 17400
LONG, SHORT = 400, 60
# Patience of a job that has to notice that a node is gone; the defaults are for real clusters.
QUICK = ("--grace", "10", "--start-timeout", "40")


@pytest.fixture(scope="module", autouse=True)
def nodes():
    """The directory of a SLURM of two nodes, n1 and n2."""
    with cluster.started(2, PORT) as place:
        yield place


@pytest.fixture(scope="module")
def adapt(base, molecules, empty_yaml):
    """Arguments of an adaptation of QM9 whose steps do not depend on its length."""

    def arguments(run, steps, *overrides):
        keys = [f"train.steps={steps}", "schedule.kind=constant", "train.checkpoint_every=20", *overrides]
        return adapt_arguments(run, base, molecules, empty_yaml, *keys)

    return arguments


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, adapt):
    """Reference run: two ranks under plain torchrun."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    status, output = torchrun(2, *adapt(run, LONG, "train.checkpoint_every=1000"), timeout=900)
    assert status == 0, output
    rows = steps_and_losses(run)
    assert [step for step, *_ in rows] == list(range(1, LONG + 1))
    return rows


@pytest.mark.long
def test_a_time_limit_saves_requeues_and_finishes(adapt, undisturbed, tmp_path):
    keys = ("train.checkpoint_every=1000", "wandb.mode=offline")
    job = submit(adapt(tmp_path / "run", LONG, *keys), "--time", "60", "--signal-before", "120")
    job.wait_for_step(20)
    # How fast this machine is today must not decide what is tested: the limit is moved to where the run is.
    job.limit(minutes=int(job.elapsed_s // 60) + 2)
    job.wait(lambda: job.restarts == 1, 400, "requeued")
    job.limit(minutes=60)
    assert job.wait_for_end(900) == "COMPLETED" and job.restarts == 1
    assert "stopped by SIGUSR1 at step" in job.log
    assert steps_and_losses(job.run) == undisturbed
    assert len(wandb_ids(job.run)) == 1 and len(list((job.run / "wandb").glob("offline-run-*"))) == 2


def test_an_array_job_prepares_the_same_bytes_as_one_process(tmp_path, empty_yaml):
    """One of its tasks is killed."""
    corpus = tmp_path / "corpus"
    for number in range(6):
        write_corpus(corpus / f"{number}.jsonl", 1, seed=number)
    keys = ("source.name=text", "tokenizer.name=characters", "length=64", "part_mb=1", f"source.path={corpus}")
    assert main(["prepare", str(empty_yaml), *keys, f"out={tmp_path / 'alone'}", "workers=1"]) == 0
    job = cluster.submit_preparation([empty_yaml, *keys, f"out={tmp_path / 'data'}", "workers=1"], "--array", "4")
    job.wait(lambda: list(tmp_path.glob(".data.*.work/scan-?????")), 120, "scanning")
    (victim, *_) = job.processes("slice=2/4")
    os.kill(victim, signal.SIGKILL)
    job.wait(lambda: (tmp_path / "data").is_dir(), 400, "done")
    states = [cluster.Job(f"{job.id}_{task}", job.run, job.directory).wait_for_end(120) for task in range(4)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert files(tmp_path / "data") == files(tmp_path / "alone")
    assert not list(tmp_path.glob(".data.*"))


@pytest.mark.long
def test_a_signal_before_any_handler_is_not_lost(adapt, undisturbed, tmp_path):
    """With ranks started by srun, without torchrun, and with another signal."""
    job = submit(adapt(tmp_path / "run", SHORT), "--starter", "srun", "--signal", "USR2")
    job.wait(lambda: len(job.ranks) == 2, 120, "with two ranks")
    slurm("scancel", "--signal=USR2", job.id)
    job.wait(lambda: job.restarts == 1, 400, "requeued")
    assert not (job.run / "checkpoints").exists(), "it came before the first step"
    assert job.wait_for_end(900) == "COMPLETED"
    assert steps_and_losses(job.run) == undisturbed[:SHORT]
    assert sorted(path.name for path in (job.directory / "logs").iterdir()) == [
        f"start-{start}-rank-{rank}.log" for start in (1, 2) for rank in (0, 1)
    ]


@pytest.mark.long
def test_preemption_saves_and_frees_the_nodes(adapt, undisturbed, tmp_path):
    job = submit(adapt(tmp_path / "run", LONG, "train.checkpoint_every=1000"))
    job.wait_for_step(20)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    assert slurm("sbatch", "--parsable", *urgent)
    assert job.wait_for_end(900) == "COMPLETED"
    assert "stopped by SIGTERM at step" in job.log
    assert steps_and_losses(job.run) == undisturbed


@pytest.mark.long
def test_scancel_saves_and_the_job_is_not_requeued(adapt, undisturbed, tmp_path):
    job = submit(adapt(tmp_path / "run", LONG, "train.checkpoint_every=1000"))
    job.wait_for_step(10)
    slurm("scancel", job.id)
    job.wait(lambda: "not requeued" in job.log or "CANCELLED" in job.log, 60, "stopped")
    assert job.wait_for_end(60) == "CANCELLED"
    time.sleep(15)  # longer than a requeued job would wait
    assert job.state == "CANCELLED" and not job.ranks
    checkpoint, skipped = newest_checkpoint(job.run / "checkpoints")
    rows = steps_and_losses(job.run)
    assert not skipped and saved_state(checkpoint)["step"] == len(rows)
    assert rows == undisturbed[: len(rows)]


@pytest.mark.long
def test_a_killed_rank_is_reported_and_the_job_requeued(adapt, undisturbed, tmp_path):
    job = submit(adapt(tmp_path / "run", SHORT), *QUICK)
    job.wait_for_step(25)
    os.kill(job.ranks[0], signal.SIGKILL)
    killed = time.monotonic()
    job.wait(lambda: "failed with status" in job.log, 60, "over")
    assert time.monotonic() - killed < 30
    assert re.search(r"on n[12]: rank [01]: killed by SIGKILL \(out of memory\?\)", job.log)
    assert "(1 of 3 at step_00000020)" in job.log
    assert job.wait_for_end(900) == "COMPLETED" and job.restarts == 1
    assert steps_and_losses(job.run) == undisturbed[:SHORT]


@pytest.mark.long
def test_a_killed_launcher_ends_the_job_and_it_is_requeued(adapt, undisturbed, tmp_path):
    """The processes that srun started on one node are killed."""
    job = submit(adapt(tmp_path / "run", SHORT), *QUICK)
    job.wait_for_step(25)
    agent = job.agents[0]
    children = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    for pid in (agent, *children):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    job.wait(lambda: "failed with status" in job.log, 60, "over")
    assert time.monotonic() - killed < 45
    assert job.wait_for_end(900) == "COMPLETED" and job.restarts == 1
    assert steps_and_losses(job.run) == undisturbed[:SHORT]


@pytest.mark.long
def test_a_node_without_power(nodes, adapt, undisturbed, tmp_path):
    """All processes of a node are killed, slurmd included; the job is requeued when two nodes are up again."""
    job = submit(adapt(tmp_path / "run", SHORT), *QUICK)
    job.wait_for_step(25)
    cluster.power_off(nodes / "run/slurmd-n2.pid")
    job.wait(lambda: "DOWN" in slurm("scontrol", "show", "node", "n2"), 120, "on a node that is down")
    job.wait(lambda: job.state == "PENDING", 120, "requeued")
    cluster.bring_up(nodes, 2, PORT)
    assert job.wait_for_end(900) == "COMPLETED" and job.restarts >= 1
    assert steps_and_losses(job.run) == undisturbed[:SHORT]


@pytest.mark.long
def test_a_node_that_never_starts_ends_the_job_after_a_limit(adapt, undisturbed, tmp_path):
    slow = tmp_path / "python"
    slow.write_text(
        '#!/bin/sh\n[ "$SLURM_NODEID.${SLURM_RESTART_COUNT:-0}" = 1.0 ] && exec sleep 1000\n'
        f'exec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    job = submit(adapt(tmp_path / "run", SHORT), "--python", slow, "--grace", "10", "--start-timeout", "30")
    job.wait(lambda: "failed with status" in job.log, 300, "over")
    assert "scmdm: on n1: no rendezvous of 2 nodes (limit 30 s): RendezvousTimeoutError" in job.log
    assert "(1 of 3 at no checkpoint)" in job.log
    assert job.wait_for_end(900) == "COMPLETED" and job.restarts == 1
    assert steps_and_losses(job.run) == undisturbed[:SHORT]


@pytest.mark.long
def test_repeated_failures_at_one_checkpoint_end_the_job(adapt, tmp_path):
    job = submit(adapt(tmp_path / "run", SHORT), "--python", "/bin/false", "--attempts", "2")
    assert job.wait_for_end(400) == "FAILED"
    assert job.restarts == 1 and "(2 of 2 at no checkpoint)" in job.log


@pytest.mark.long
def test_a_run_directory_is_for_one_job(adapt, undisturbed, tmp_path):
    first = submit(adapt(tmp_path / "run", LONG), *QUICK)
    first.wait_for_step(25)
    second = cluster.resubmit(first)
    assert second.wait_for_end(400) == "FAILED"
    assert second.restarts == 0 and f"in SLURM job {first.id}, since" in second.log
    assert f"(scancel {first.id})" in second.log
    assert first.state == "RUNNING"
    slurm("scancel", "--signal=KILL", first.id)
    slurm("scancel", first.id)
    first.wait_for_end(60)
    third = cluster.resubmit(first)
    third.wait(lambda: "resuming from" in third.log, 400, "resumed")
    slurm("scancel", third.id)
    third.wait_for_end(60)
    rows = steps_and_losses(first.run)
    assert len(rows) > 20 and rows == undisturbed[: len(rows)]


@pytest.mark.long
def test_slurm_is_asked_whether_a_holder_on_another_machine_lives(tmp_path):
    """Its lease was renewed an hour ago, so that its silence would say that it is dead."""
    number = slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 300")
    job = cluster.Job(number, tmp_path, tmp_path)
    job.wait(lambda: job.state == "RUNNING", 60, "running")
    me = LeaseHolder.current()
    holder = dataclasses.replace(me, host="elsewhere", machine="another", job=number)
    lease = tmp_path / "lease" / "00000001.json"
    lease.parent.mkdir()
    lease.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(lease, (time.time() - 3600,) * 2)
    assert holder_lives(holder, me) is True
    with pytest.raises(InUseError, match=f"scancel {number}"), acquire(lease.parent, "run_dir=x"):
        pass
    slurm("scancel", number)
    job.wait_for_end(60)
    job.wait(lambda: job_state(number) == "CANCELLED", 60, "cancelled")
    assert holder_lives(holder, me) is False
    os.utime(lease)
    with acquire(lease.parent, "run_dir=x") as taken_over:
        assert taken_over.predecessor == holder
    assert job_state("999999") == "GONE"
