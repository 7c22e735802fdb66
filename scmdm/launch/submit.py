"""`scmdm launch slurm` and `scmdm launch local`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

from scmdm.config.launch import LocalRanks, Ranks, SlurmJob
from scmdm.errors import UserError
from scmdm.launch.batch_script import render, render_preparation, script_path, submission
from scmdm.launch.freeze import ONE_PROCESS, FrozenLaunch, freeze, plan_launch, resolve
from scmdm.system.files import atomic_write_text


def launch_slurm(
    launched: str,
    subject: Path,
    *,
    overrides: list[str],
    config: Path | None,
    dry_run: bool,
    parsable: bool,
    array: int,
    ranks: Ranks,
    job: SlurmJob,
) -> None:
    """Freeze code and configuration, write the batch script and submit it.

    `launched` is the command, `subject` its first argument. prepare runs as `array` tasks, everything else on `ranks`.
    `parsable` prints the id of the job and nothing else.
    """
    ranks.validate()
    job = dataclasses.replace(job, sbatch=tuple(line.removeprefix("--") for line in job.sbatch))
    job.validate()
    _check_options(launched, ranks, job, array)
    preparing = launched == "prepare"
    size = array if preparing else ranks.size
    resolved = resolve(launched, subject, overrides, config=config, ranks=size, later=bool(job.after))
    frozen = plan_launch(resolved)
    if preparing:
        script = render_preparation(frozen, ranks, job, Path.cwd(), array)
    else:
        script = render(frozen, ranks, job, Path.cwd())
    if dry_run:
        print(script, end="")
        return
    freeze(frozen, resolved.config)
    atomic_write_text(script_path(frozen), script)
    number = _submit(frozen, job)
    print(number if parsable else f"job {number}: {script_path(frozen)}, log beside it")


def _check_options(launched: str, ranks: Ranks, job: SlurmJob, array: int) -> None:
    """Raise UserError for an option that the launched command does not read."""
    preparing, unset = launched == "prepare", Ranks()
    _check_ranks(launched, ranks)
    alone = "left out: tasks of an array do not wait for each other"
    for option, value, possible, wanted in (
        ("--array", array, preparing or array == 1, "left out: it is for prepare"),
        ("--nodes", ranks.nodes, not preparing or ranks.nodes == 1, "left out: --array spreads prepare over nodes"),
        ("--gpus-per-node", ranks.gpus_per_node, not preparing or not ranks.gpus_per_node, "left out: no GPU is used"),
        ("--ranks-per-node", ranks.ranks_per_node, not preparing or not ranks.ranks_per_node, "left out: set workers"),
        ("--starter", ranks.starter, not preparing or ranks.starter == unset.starter, alone),
        ("--start-timeout", ranks.start_timeout, not preparing or ranks.start_timeout == unset.start_timeout, alone),
        ("--grace", ranks.grace, not preparing or ranks.grace == unset.grace, alone),
        ("--attempts", job.attempts, not preparing or job.attempts == SlurmJob().attempts, "left out: none is counted"),
    ):
        if not possible:
            raise UserError(f"{option}={value} is not possible with {launched}; it must be {wanted}")


def _check_ranks(launched: str, ranks: LocalRanks) -> None:
    """Raise UserError for several ranks of a command that one process runs."""
    if launched in ONE_PROCESS and ranks.size > 1:
        raise UserError(
            f"{launched} on {ranks.size} ranks is not possible: it is one process; leave --nodes and --ranks-per-node "
            "out, and give at most --gpus-per-node 1"
        )


def _submit(frozen: FrozenLaunch, job: SlurmJob) -> str:
    script = script_path(frozen)
    try:
        done = subprocess.run(submission(frozen, job), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"no sbatch on this machine; submit {script} on the cluster, or use `launch local`") from error
    if done.returncode != 0:
        raise UserError(f"sbatch refused {script}: {' '.join(done.stderr.split())}; correct it and submit it by hand")
    return done.stdout.split(";")[0].strip()


def launch_local(
    launched: str,
    subject: Path,
    *,
    overrides: list[str],
    config: Path | None,
    dry_run: bool,
    attempts: int,
    ranks: LocalRanks,
) -> None:
    """Freeze code and configuration, then replace this process by the launcher of the ranks."""
    ranks.validate()
    if launched == "prepare":
        raise UserError("prepare is not possible with `launch local`; run `scmdm prepare`, which uses all cores")
    _check_ranks(launched, ranks)
    resolved = resolve(launched, subject, overrides, config=config, ranks=ranks.size)
    frozen = plan_launch(resolved)
    command = local_command(frozen, ranks, attempts)
    if dry_run:
        environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in frozen.environment.items())
        print(environment, shlex.join(command))
        return
    freeze(frozen, resolved.config)
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, **frozen.environment})


def local_command(frozen: FrozenLaunch, ranks: LocalRanks, attempts: int) -> list[str]:
    """Return the command line that starts the ranks on one machine."""
    node = [sys.executable, "-m", "scmdm.launch.node", f"--ranks-per-node={ranks.per_node}", f"--attempts={attempts}"]
    places = [f"--logs={frozen.logs}", f"--stacks={frozen.stacks}"]
    return [*node, *places, "--", *frozen.arguments(str(frozen.config))]
