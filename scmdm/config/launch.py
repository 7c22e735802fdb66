"""Options of `scmdm launch`: ranks, machines, container and SLURM job."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from scmdm.config.fields import key, require

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", re.ASCII)
_JOB = re.compile(r"\d+(_\d+)?", re.ASCII)  # with the number of a task of an array
_DAY = 86_400


@dataclass(frozen=True)
class LocalRanks:
    """Ranks on one machine."""

    gpus_per_node: int = key(0, help="GPUs per machine, one rank on each; 0: ranks on CPUs", at_least=0, at_most=1024)
    ranks_per_node: int | None = key(
        None, help="ranks per machine without GPUs (default: 1)", at_least=1, at_most=65536
    )

    @property
    def per_node(self) -> int:
        """Ranks per machine."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def size(self) -> int:
        """Ranks of all machines."""
        return self.per_node

    def validate(self) -> None:
        """Raise UserError unless every GPU has a rank."""
        matches = not self.gpus_per_node or self.per_node == self.gpus_per_node
        require(matches, "--ranks-per-node", self.per_node, "left out with --gpus-per-node: each GPU has a rank")


@dataclass(frozen=True)
class Ranks(LocalRanks):
    """Ranks on one or several machines."""

    nodes: int = key(1, help="number of machines", at_least=1, at_most=65536)
    cpus_per_rank: int | None = key(None, help="CPU cores per rank", at_least=1, at_most=65536)
    starter: str = key(
        "torchrun",
        help="program that starts the ranks: one torchrun per machine, or srun",
        choices=("torchrun", "srun"),
    )
    start_timeout: int = key(600, help="seconds to wait for all machines at the start", at_least=1, at_most=_DAY)
    grace: int = key(60, help="seconds to wait for the other machines after one has ended", at_least=1, at_most=_DAY)

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Container:
    """The container that the ranks run in."""

    image: str | None = key(None, help="container image (default: none, ranks run on the machine itself)")
    runtime: str = key("pyxis", help="container runtime", choices=("pyxis", "apptainer"))
    mount: tuple[str, ...] = key((), help="HOST:CONTAINER, a mount besides the working and run directories; repeatable")


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that runs the ranks."""

    name: str | None = key(None, help="name of the job (default: scmdm-RUN)")
    time: str | None = key(None, help="time limit of one start, as for sbatch: 4:00:00")
    partition: str | None = key(None, help="partition")
    account: str | None = key(None, help="account")
    qos: str | None = key(None, help="quality of service")
    signal: str = key("USR1", help="signal sent before the time limit", choices=("USR1", "USR2", "TERM"))
    signal_before: int = key(
        120, help="seconds between that signal and the time limit; 0: no signal", at_least=0, at_most=_DAY
    )
    attempts: int = key(3, help="successive failures at the same checkpoint that end the job", at_least=1, at_most=1000)
    requeue: bool = key(True, help="do not requeue the job from its script: exit with 85, for SLURM's RequeueExit=85")
    after: tuple[str, ...] = key(
        (), help="JOB that must have succeeded before this one starts; its output may be missing now; repeatable"
    )
    setup: tuple[str, ...] = key((), help="shell line to run first, such as 'module load cuda'; repeatable")
    sbatch: tuple[str, ...] = key((), help="KEY=VALUE, any other option of sbatch, such as mem=0; repeatable")
    python: str | None = key(
        None, help="interpreter that has scmdm's packages (default: this one; in a container: python)"
    )
    container: Container = field(default_factory=Container)

    def validate(self) -> None:
        """Raise UserError for a malformed time limit or job id, a value of several lines, or an unused option."""
        timed = self.time is None or _TIME.fullmatch(self.time) is not None
        require(timed, "--time", self.time, "minutes, HH:MM:SS or days-hours")
        own = Container()
        for option, value, default in (
            ("--container-runtime", self.container.runtime, own.runtime),
            ("--container-mount", self.container.mount, own.mount),
        ):
            used = self.container.image is not None or value == default
            require(used, option, value, "left out without --container-image")
        for job in self.after:
            require(_JOB.fullmatch(job) is not None, "--after", job, "the id of a job, as --parsable prints it")
        for option, line in (
            *(("--setup", line) for line in self.setup),
            *(("--sbatch", line) for line in self.sbatch),
            ("--name", self.name or ""),
        ):
            require("\n" not in line, option, line, "one line; repeat the option for another")
