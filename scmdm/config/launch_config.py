"""What `scmdm launch` is asked for: machines, limits, how ranks are started, what happens when they end."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from scmdm.errors import UserError

STARTERS = ("torchrun", "srun")
RUNTIMES = ("pyxis", "apptainer")
SIGNALS = ("USR1", "USR2", "TERM")
_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")


@dataclass(frozen=True)
class Ranks:
    """How many processes, where, and by what they are started."""

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int | None = None  # None: one per GPU, or one
    cpus_per_rank: int | None = None
    starter: str = "torchrun"
    start_timeout_s: int = 600  # how long the first nodes wait for the last
    grace_s: int = 60  # how long the other nodes may take to end behind the first

    @property
    def per_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def validate(self) -> None:
        for key, value, least in (
            ("nodes", self.nodes, 1),
            ("gpus-per-node", self.gpus_per_node, 0),
            ("ranks-per-node", self.per_node, 1),
            ("cpus-per-rank", self.cpus_per_rank or 1, 1),
            ("start-timeout", self.start_timeout_s, 1),
            ("grace", self.grace_s, 1),
        ):
            _require(value >= least, key, value, f"at least {least}")
        if self.gpus_per_node:
            _require(self.per_node == self.gpus_per_node, "ranks-per-node", self.per_node, "left out: a rank per GPU")


@dataclass(frozen=True)
class Container:
    """Where the ranks run, if not on the bare machine."""

    image: str | None = None
    runtime: str = "pyxis"
    mounts: tuple[str, ...] = ()  # HOST:CONTAINER, besides the working directory and the run directory


@dataclass(frozen=True)
class SlurmJob:
    """The job around the ranks."""

    name: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    signal: str = "USR1"
    signal_before_s: int = 120
    attempts: int = 3  # failures in a row at the same checkpoint that end the job
    requeue: bool = True  # by the script; else it exits with 85 and the site's RequeueExit (or nobody) does it
    setup: tuple[str, ...] = ()  # shell lines before anything else
    directives: tuple[str, ...] = ()  # further #SBATCH options, as in mem=0
    python: str | None = None  # None: this interpreter, or in a container `python`
    container: Container = field(default_factory=Container)

    def validate(self) -> None:
        _require(self.signal in SIGNALS, "signal", self.signal, f"one of {', '.join(SIGNALS)}")
        _require(self.signal_before_s >= 0, "signal-before", self.signal_before_s, "0 (none) or seconds")
        _require(self.attempts >= 1, "attempts", self.attempts, "at least 1")
        runtime = self.container.runtime
        _require(runtime in RUNTIMES, "container-runtime", runtime, f"one of {', '.join(RUNTIMES)}")
        timed = self.time is None or _TIME.fullmatch(self.time) is not None
        _require(timed, "time", self.time, "minutes, HH:MM:SS or days-hours")
        for line in (*self.setup, *self.directives, self.name or ""):
            _require("\n" not in line, "setup", line, "one line; give the option again for another")


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"--{key}={value} is not possible; it must be {allowed}")
