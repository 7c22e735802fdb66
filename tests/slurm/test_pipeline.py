"""adapt -> evaluate -> export as jobs that wait for each other, on a real SLURM of four nodes started here."""

import json

import pytest

from scmdm.checkpoint.seal import verify_checkpoint
from tests.kills import adapt_arguments, last_step
from tests.slurm import cluster
from tests.slurm.cluster import slurm, submit_parsable

pytestmark = [pytest.mark.slow, pytest.mark.long]
NODES, PORT, STEPS = 4, 17500, 200
QUICK = ("--grace", "10", "--start-timeout", "60")
HOSTILE = "a b'c\"d$HOME `e`;f 50%j"


@pytest.fixture(scope="module", autouse=True)
def place():
    with cluster.started(NODES, PORT) as directory:
        yield directory


@pytest.fixture
def pipeline(base, molecules, empty_yaml, tmp_path):
    """Submits the three jobs on a number of nodes, in a directory with a hostile name; returns them and the export."""
    cwd = tmp_path / HOSTILE
    cwd.mkdir()

    def submit(nodes, *options):
        ranks = ("--nodes", nodes, "--ranks-per-node", 1, *QUICK)
        keys = [
            f"train.steps={STEPS}",
            "schedule.kind=constant",
            "train.checkpoint_every=50",
            "train.micro_batch_size=16",
        ]
        given = adapt_arguments(cwd / "run", base, molecules, empty_yaml, *keys)
        adapt = submit_parsable(*given, *ranks, "--sbatch", "hold", *options, cwd=cwd)
        measured = ("nelbo_samples=64", "num=32", "sampler.steps=8", "batch_size=8")
        evaluate = submit_parsable("evaluate", "run", *measured, *ranks, "--after", adapt.id, cwd=cwd)
        export = submit_parsable("export", "run", "an export", "--after", evaluate.id, cwd=cwd)
        assert [job.state for job in (adapt, evaluate, export)] == ["PENDING"] * 3
        slurm("scontrol", "release", adapt.id)
        return (adapt, evaluate, export), cwd

    return submit


def check_results(cwd):
    (result,) = (cwd / "run/evaluations").glob("*.json")
    found = json.loads(result.read_text())
    assert found["step"] == STEPS and found["samples"] and "conditioned" in found["nelbo"]
    assert last_step(cwd / "run") == STEPS
    assert not verify_checkpoint(cwd / "an export")
    assert not list(cwd.glob(".*")), "nothing unfinished is left"


def lose_a_node(job, place, last):
    """Power a node of the job off, and on again once SLURM has requeued the job.

    SLURM may then requeue it once more: its late messages to the node that was off end the next start, too.
    """
    name = job.nodes[-1 if last else 0]
    cluster.power_off(place / f"run/slurmd-{name}.pid")
    job.wait(lambda: "DOWN" in slurm("scontrol", "show", "node", name), 120, f"on {name}, which is down")
    job.wait(lambda: job.restarts >= 1, 120, "requeued")
    cluster.bring_up(place, NODES, PORT)


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_node_lost_in_each_phase(pipeline, place, nodes):
    jobs, cwd = pipeline(nodes)
    adapt, evaluate, export = jobs
    adapt.wait_for_step(60)
    lose_a_node(adapt, place, last=True)
    assert adapt.wait_for_end(900) == "COMPLETED"
    for job, last in ((evaluate, True), (export, False)):
        job.wait(lambda job=job: job.state == "RUNNING" and job.processes("scmdm.launch.node"), 200, "running")
        lose_a_node(job, place, last)
        assert job.wait_for_end(900) == "COMPLETED"
    check_results(cwd)


def test_a_phase_that_fails_ends_the_pipeline(pipeline):
    """What depends on it is cancelled by SLURM, and never starts."""
    (adapt, *later), cwd = pipeline(2, "--python", "/bin/false", "--attempts", "1")
    assert adapt.wait_for_end(120) == "FAILED"
    for job in later:
        assert job.wait_for_end(120) == "CANCELLED"
        assert "Reason=DependencyNeverSatisfied" in slurm("scontrol", "show", "job", job.id) and not job.log
    assert not (cwd / "an export").exists()


def test_a_signal_requeues_an_evaluation(pipeline):
    """It ends at once and starts again, with the results that are kept; the export waits for the second start."""
    (adapt, evaluate, export), cwd = pipeline(2)
    assert adapt.wait_for_end(900) == "COMPLETED"
    # A signal that ends a launcher before it has blocked signals has another status. Ranks are started with `-u`.
    evaluate.wait(lambda: evaluate.processes("-u"), 200, "running")
    slurm("scancel", "--signal=USR1", evaluate.id)
    evaluate.wait(lambda: evaluate.restarts == 1, 120, "requeued")
    assert "status 85" in evaluate.log and export.state == "PENDING"
    assert evaluate.wait_for_end(900) == export.wait_for_end(900) == "COMPLETED"
    check_results(cwd)
