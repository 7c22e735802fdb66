"""`scmdm launch slurm` and `scmdm launch local`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmdm.config.launch_config import RUNTIMES, SIGNALS, STARTERS, Container, Ranks, SlurmJob
from scmdm.errors import UserError
from scmdm.system.files import atomic_write_text

if TYPE_CHECKING:
    from scmdm.config.preparation import PrepareConfig
    from scmdm.config.run import RunConfig
    from scmdm.launch.freeze import FrozenLaunch


def add_launch(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the command line."""
    summary = "Run a command as a SLURM job, or here through torchrun, from a frozen copy of code and configuration."
    parser = commands.add_parser("launch", help=summary, description=summary)
    places = parser.add_subparsers(dest="place", required=True, metavar="PLACE")
    slurm = _add_place(places, "slurm", "Write a batch script into the run directory and submit it.", launch_slurm)
    _add_job(slurm)
    local = _add_place(places, "local", "Start the ranks on this machine, through torchrun.", launch_local)
    local.add_argument("--attempts", type=int, default=1, help="starts at most, when ranks fail")


def _add_place(
    places: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, run: object
) -> argparse.ArgumentParser:
    parser = places.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    parser.add_argument("launched", metavar="COMMAND", help="train, adapt or, on SLURM, prepare")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/qm9/adapt.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key of it, run_dir above all")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and write nothing")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="a rank each; 0 (default): CPUs")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="without GPUs: so many ranks (default 1)")
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    add, job, ranks = parser.add_argument, SlurmJob(), Ranks()
    add("--nodes", type=int, default=1, metavar="N")
    add(
        "--array", type=int, default=1, metavar="TASKS", help="prepare: so many tasks, each on a node of its own or not"
    )
    add("--cpus-per-rank", type=int, metavar="C")
    add("--time", help="limit of one start, as for sbatch: 4:00:00")
    add("--partition")
    add("--account")
    add("--qos")
    add("--name", help="of the job (default: scmdm-RUN)")
    add("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; repeatable")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line, as 'module load cuda'; repeatable")
    add("--python", help="interpreter that has scmdm's packages (default: this one; in a container `python`)")
    add("--container-image")
    add("--container-runtime", choices=RUNTIMES, default="pyxis")
    add("--container-mount", action="append", default=[], metavar="HOST:THERE", help="another mount; repeatable")
    add("--starter", choices=STARTERS, default="torchrun", help="of the ranks: one torchrun a node, or srun itself")
    add("--signal", choices=SIGNALS, default=job.signal, help=f"that announces the time limit (default {job.signal})")
    add("--signal-before", type=int, default=job.signal_before_s, metavar="S", help="so many seconds before (120)")
    add("--attempts", type=int, default=job.attempts, help="failures in a row at one checkpoint that end the job (3)")
    add("--no-requeue", action="store_true", help="exit with 85 and leave the requeue to SLURM's RequeueExit=85")
    add("--start-timeout", type=int, default=ranks.start_timeout_s, metavar="S", help="wait for all nodes (600)")
    add("--grace", type=int, default=ranks.grace_s, metavar="S", help="wait for the rest when a node has ended (60)")


def launch_slurm(options: argparse.Namespace) -> None:
    """Freeze code and configuration, write the batch script and submit it."""
    from scmdm.launch.batch_script import script_path
    from scmdm.launch.freeze import freeze, plan_launch

    ranks, job = _ranks(options), _job(options)
    ranks.validate()
    job.validate()
    config = _resolve(options, ranks)
    frozen = plan_launch(options.launched, config)
    script = _render(options, frozen, ranks, job)
    if options.dry_run:
        print(script, end="")
        return
    freeze(frozen, config)
    atomic_write_text(script_path(frozen), script)
    print(f"job {_submit(script_path(frozen))}: {script_path(frozen)}, log beside it")


def _resolve(options: argparse.Namespace, ranks: Ranks) -> RunConfig | PrepareConfig:
    from scmdm.launch.freeze import resolve, resolve_preparation

    preparing = options.launched == "prepare"
    for key, ok, wanted in (
        ("array", options.array >= 1, "at least 1"),
        ("array", preparing or options.array == 1, "left out: it is for prepare"),
        ("nodes", not preparing or options.nodes == 1, "left out: prepare spreads over the tasks of --array"),
        ("gpus-per-node", not preparing or not options.gpus_per_node, "left out: prepare uses none"),
        ("ranks-per-node", not preparing or not options.ranks_per_node, "left out: see the key workers"),
    ):
        if not ok:
            value = getattr(options, key.replace("-", "_"))
            raise UserError(f"--{key}={value} is not possible with {options.launched}; it must be {wanted}")
    if preparing:
        return resolve_preparation(options.config, options.overrides, options.array)
    return resolve(options.launched, options.config, options.overrides, ranks.size)


def _render(options: argparse.Namespace, frozen: FrozenLaunch, ranks: Ranks, job: SlurmJob) -> str:
    from scmdm.launch.batch_script import render, render_preparation

    if options.launched == "prepare":
        return render_preparation(frozen, ranks, job, Path.cwd(), options.array)
    return render(frozen, ranks, job, Path.cwd())


def _ranks(options: argparse.Namespace) -> Ranks:
    return Ranks(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node,
        cpus_per_rank=options.cpus_per_rank,
        starter=options.starter,
        start_timeout_s=options.start_timeout,
        grace_s=options.grace,
    )


def _job(options: argparse.Namespace) -> SlurmJob:
    return SlurmJob(
        name=options.name,
        time=options.time,
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        signal=options.signal,
        signal_before_s=options.signal_before,
        attempts=options.attempts,
        requeue=not options.no_requeue,
        setup=tuple(options.setup),
        directives=tuple(line.removeprefix("--") for line in options.sbatch),
        python=options.python,
        container=Container(options.container_image, options.container_runtime, tuple(options.container_mount)),
    )


def _submit(script: Path) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no sbatch here; submit {script} where SLURM is, or use `launch local`") from error
    if done.returncode != 0:
        raise UserError(f"sbatch refused {script}: {' '.join(done.stderr.split())}; correct it and submit it by hand")
    return done.stdout.split(";")[0].strip()


def launch_local(options: argparse.Namespace) -> None:
    """Freeze code and configuration, then replace this process by the launcher of the ranks."""
    from scmdm.launch.freeze import freeze, plan_launch, resolve

    ranks = Ranks(gpus_per_node=options.gpus_per_node, ranks_per_node=options.ranks_per_node)
    ranks.validate()
    config = resolve(options.launched, options.config, options.overrides, ranks.size)
    frozen = plan_launch(options.launched, config)
    command = local_command(frozen, ranks, options.attempts)
    if options.dry_run:
        print(" ".join(f"{key}={shlex.quote(value)}" for key, value in frozen.environment.items()), shlex.join(command))
        return
    freeze(frozen, config)
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, **frozen.environment})


def local_command(frozen: FrozenLaunch, ranks: Ranks, attempts: int) -> list[str]:
    """Command that starts the ranks on this machine."""
    node = [sys.executable, "-m", "scmdm.launch.node", f"--ranks-per-node={ranks.per_node}", f"--attempts={attempts}"]
    return [*node, f"--logs={frozen.logs}", "--", *frozen.arguments]
