"""Jobs on the loopback SLURM: submit, wait, read results."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from scmdm.observability.run_metrics import read_metrics
from tests.kills import last_step

HERE = Path(__file__).parent
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "GONE")


@contextlib.contextmanager
def started(nodes, port):
    """The directory of a SLURM of `nodes` nodes, n1 and so on; skips where none can run."""
    if os.geteuid() != 0:
        pytest.skip("the daemons of this SLURM need root")
    with tempfile.TemporaryDirectory(prefix="slurm-") as place, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{place}/slurm.conf")
        try:
            bring_up(place, nodes, port)
            yield Path(place)
        finally:
            subprocess.run(["bash", HERE / "down.sh", place])


def bring_up(place, nodes, port):
    """Start daemons that do not run."""
    done = subprocess.run(["bash", HERE / "up.sh", place, str(nodes), str(port)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"SLURM cannot be installed: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


def slurm(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300).stdout.strip()


@dataclass
class Job:
    id: str
    run: Path
    directory: Path  # of the launch

    @property
    def state(self):
        return self._show("JobState")

    @property
    def restarts(self):
        return int(self._show("Restarts"))

    @property
    def elapsed_s(self):
        hours, minutes, seconds = map(int, self._show("RunTime").split(":"))
        return 3600 * hours + 60 * minutes + seconds

    @property
    def nodes(self):
        return slurm("scontrol", "show", "hostnames", self._show("NodeList")).split()

    def limit(self, minutes):
        slurm("scontrol", "update", f"JobId={self.id}", f"TimeLimit={minutes}")

    def _show(self, key):
        found = re.search(rf"\b{key}=(\S+)", slurm("scontrol", "show", "job", self.id))
        return found[1] if found else "GONE"

    @property
    def log(self):
        path = self.directory / f"job-{self.id}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, condition, limit, what):
        """Until `condition()`; fails after `limit` seconds, or when the job has ended without it."""
        end = time.monotonic() + limit
        while not condition():
            over = self.state in FINAL and not condition()
            assert not over, f"{self.state} before {what}:\n{self.log}"
            assert time.monotonic() < end, f"not {what} within {limit} s ({self.state}):\n{self.log}"
            time.sleep(0.2)

    def wait_for_step(self, step, limit=400):
        self.wait(lambda: last_step(self.run) >= step, limit, f"at step {step}")

    def wait_for_end(self, limit):
        self.wait(lambda: self.state in FINAL, limit, "at an end")
        return self.state

    def processes(self, pattern):
        """Ids of this run's processes whose command line holds `pattern`, srun apart."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                line = (place / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if str(self.directory / "config.yaml") in line and pattern in line and "srun" not in _name(place.name):
                found.append(int(place.name))
        return found

    @property
    def ranks(self):
        agents = set(self.agents)
        return [pid for pid in self.processes("adapt") if pid not in agents]

    @property
    def agents(self):
        return self.processes("scmdm.launch.node")


def _name(pid):
    return Path(f"/proc/{pid}/comm").read_text()


def submit_parsable(*arguments, cwd):
    """`scmdm launch slurm --parsable` in the directory `cwd`, as a shell line would chain it."""
    done = _scmdm("launch", "slurm", *arguments, "--parsable", cwd=cwd)
    number = done.stdout.strip()
    assert re.fullmatch(r"\d+", number), done.stdout
    script = re.search(r"^ *Command=(.*)$", slurm("scontrol", "show", "job", number), re.M)[1]
    return Job(number, Path(script).parents[2], Path(script).parent)


def submit(arguments, *options):
    """`scmdm launch slurm` of a command's arguments, on two nodes with a rank each."""
    return _launch(*arguments, "--nodes", "2", "--ranks-per-node", "1", *options)


def submit_preparation(arguments, *options):
    """`scmdm launch slurm prepare`."""
    return _launch("prepare", *arguments, *options)


def _launch(*arguments):
    done = _scmdm("launch", "slurm", *arguments)
    job, script = re.fullmatch(r"job (\d+): (\S+), log beside it\n", done.stdout).groups()
    return Job(job, Path(script).parents[2], Path(script).parent)


def _scmdm(*arguments, cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", "scmdm", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done


def resubmit(job):
    """Submit a job's script again."""
    return Job(slurm("sbatch", "--parsable", str(job.directory / "job.sbatch")), job.run, job.directory)


def power_off(pid_file):
    """Kill all processes of a node, which are those in the mount namespace of its slurmd."""
    node = Path(f"/proc/{pid_file.read_text().strip()}/ns/mnt").readlink()
    assert node != Path("/proc/self/ns/mnt").readlink()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (place / "ns/mnt").readlink() == node:
                os.kill(int(place.name), signal.SIGKILL)


def wandb_ids(run):
    return {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}


def steps_and_losses(run):
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def saved_state(checkpoint):
    return json.loads((checkpoint / "state.json").read_text())
