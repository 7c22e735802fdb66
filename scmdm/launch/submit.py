"""`scmdm launch slurm` and `scmdm launch local`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

from scmdm.config.launch import LocalRanks, Ranks, SlurmJob
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.errors import UserError
from scmdm.launch.batch_script import render, render_preparation, script_path
from scmdm.launch.freeze import FrozenLaunch, freeze, plan_launch, resolve, resolve_preparation
from scmdm.system.files import atomic_write_text


def launch_slurm(
    launched: str, config: Path, *, overrides: list[str], dry_run: bool, array: int, ranks: Ranks, job: SlurmJob
) -> None:
    """Freeze code and configuration, write the batch script and submit it.

    `launched` is the command: train, adapt, or prepare, which runs as `array` tasks.
    """
    ranks.validate()
    job = dataclasses.replace(job, sbatch=tuple(line.removeprefix("--") for line in job.sbatch))
    job.validate()
    _check_options(launched, ranks, array)
    preparing = launched == "prepare"
    resolved: RunConfig | PrepareConfig
    if preparing:
        resolved = resolve_preparation(config, overrides, array)
    else:
        resolved = resolve(launched, config, overrides, ranks.size)
    frozen = plan_launch(launched, resolved)
    if preparing:
        script = render_preparation(frozen, ranks, job, Path.cwd(), array)
    else:
        script = render(frozen, ranks, job, Path.cwd())
    if dry_run:
        print(script, end="")
        return
    freeze(frozen, resolved)
    atomic_write_text(script_path(frozen), script)
    print(f"job {_submit(script_path(frozen))}: {script_path(frozen)}, log beside it")


def _check_options(launched: str, ranks: Ranks, array: int) -> None:
    """Raise UserError for an option that the launched command does not read."""
    preparing = launched == "prepare"
    for option, value, possible, wanted in (
        ("--array", array, preparing or array == 1, "left out: it is for prepare"),
        ("--nodes", ranks.nodes, not preparing or ranks.nodes == 1, "left out: --array spreads prepare over nodes"),
        ("--gpus-per-node", ranks.gpus_per_node, not preparing or not ranks.gpus_per_node, "left out: no GPU is used"),
        ("--ranks-per-node", ranks.ranks_per_node, not preparing or not ranks.ranks_per_node, "left out: set workers"),
    ):
        if not possible:
            raise UserError(f"{option}={value} is not possible with {launched}; it must be {wanted}")


def _submit(script: Path) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"no sbatch on this machine; submit {script} on the cluster, or use `launch local`") from error
    if done.returncode != 0:
        raise UserError(f"sbatch refused {script}: {' '.join(done.stderr.split())}; correct it and submit it by hand")
    return done.stdout.split(";")[0].strip()


def launch_local(
    launched: str, config: Path, *, overrides: list[str], dry_run: bool, attempts: int, ranks: LocalRanks
) -> None:
    """Freeze code and configuration, then replace this process by the launcher of the ranks."""
    ranks.validate()
    resolved = resolve(launched, config, overrides, ranks.size)
    frozen = plan_launch(launched, resolved)
    command = local_command(frozen, ranks, attempts)
    if dry_run:
        environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in frozen.environment.items())
        print(environment, shlex.join(command))
        return
    freeze(frozen, resolved)
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, **frozen.environment})


def local_command(frozen: FrozenLaunch, ranks: LocalRanks, attempts: int) -> list[str]:
    """Return the command line that starts the ranks on one machine."""
    node = [sys.executable, "-m", "scmdm.launch.node", f"--ranks-per-node={ranks.per_node}", f"--attempts={attempts}"]
    return [*node, f"--logs={frozen.logs}", "--", *frozen.arguments]
