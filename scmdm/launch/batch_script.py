"""Batch scripts for SLURM: self-contained and readable, so that a user can submit one again by hand.

Every value is quoted for bash or sbatch; values that cannot be quoted are refused.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from signal import Signals

from scmdm.config.launch import Ranks, SlurmJob
from scmdm.errors import UserError
from scmdm.launch.freeze import FrozenLaunch
from scmdm.system.run_directory import CHECKPOINTS, LATEST_FILE
from scmdm.system.signals import REQUEUE_EXIT, STOP_SIGNALS_VARIABLE

_SCRIPT = """\
#!/usr/bin/env bash
# scmdm {command} into {run}
# Written by `scmdm launch slurm`, submitted by `{submission}`.
# `sbatch {script}` submits it again.
{directives}

launch={launch}
{setup}
# The copy of scmdm made at the launch, not the one in the image or the working directory.
python=(env {environment} {python})

# The address by which SLURM itself reaches the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$((10000 + SLURM_JOB_ID % 20000))
attempt=${{SLURM_RESTART_COUNT:-0}}
echo "scmdm: job $SLURM_JOB_ID, start $((attempt + 1)), on $SLURM_JOB_NODELIST, rendezvous at $head:$port"

# SLURM signals the ranks, too. Without these traps the signals would end this shell before the ranks.
trap : {trapped}

# When a task has ended, the others have {grace} s to save and end before they are killed.
{srun}
status=$?

requeue() {{
  # scontrol would requeue even a job that was cancelled while its ranks saved.
  state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
  if [ "$state" != RUNNING ]; then
    echo "scmdm: the job is ${{state:-gone}}: not requeued"
    exit "$status"
  fi
  {requeue}
  exit "$status"
}}

case $status in
  0)
    exit 0
    ;;
  75)
    echo "scmdm: the run directory is in use by another run, see above: not requeued"
    exit 75
    ;;
  {stopped})
    echo "scmdm: stopped by a signal (status $status)"
    status={requeue_exit}
    requeue
    ;;
esac
# The job ends after {attempts} failures at the same checkpoint; a new checkpoint restarts the count.
at=$(cat {latest} 2>/dev/null || echo "no checkpoint")
echo "$at" >>"$launch/failures-$SLURM_JOB_ID"
failures=$(grep -cxF "$at" "$launch/failures-$SLURM_JOB_ID")
echo "scmdm: failed with status $status ($failures of {attempts} at $at); the ranks' logs are in $launch/logs"
[ "$failures" -lt {attempts} ] && requeue
exit "$status"
"""


_PREPARATION = """\
#!/usr/bin/env bash
# scmdm prepare of {target} by an array of tasks, which share the parts of the corpus.
# Written by `scmdm launch slurm`; `sbatch {script}` continues where it stopped.
{directives}

launch={launch}
{setup}
# The copy of scmdm made at the launch, not the one in the image or the working directory.
python=(env {environment} {python})
start=$((${{SLURM_RESTART_COUNT:-0}} + 1))
echo "scmdm: task $SLURM_ARRAY_TASK_ID of {tasks}, job $SLURM_JOB_ID, start $start, on $SLURM_JOB_NODELIST"

# SLURM signals shortly before the time limit. Nothing needs saving: finished parts are on disk.
trap '{before_limit}' {signal}
{srun} &
wait $!
"""

_REQUEUE = 'scontrol requeue "$SLURM_JOB_ID"'
_BEFORE_LIMIT = {  # by whether the job is requeued from its script
    True: f'echo "scmdm: requeued before the time limit"; {_REQUEUE}',
    False: f'echo "scmdm: stopped before the time limit"; exit {REQUEUE_EXIT}',
}


def render_preparation(frozen: FrozenLaunch, ranks: Ranks, job: SlurmJob, working_directory: Path, tasks: int) -> str:
    """Render the batch script of a preparation by an array of `tasks` tasks."""
    command = '"${python[@]}" -m scmdm prepare "$launch/config.yaml" ' + f'slice="$SLURM_ARRAY_TASK_ID/{tasks}"'
    cpus = [] if ranks.cpus_per_rank is None else ['--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    return _PREPARATION.format(
        **_common(frozen, job, frozen.environment),
        target=_one_line("out", frozen.target),
        directives="\n".join(_directives(frozen, ranks, job, working_directory, tasks)),
        tasks=tasks,
        signal=job.signal,
        before_limit=_BEFORE_LIMIT[job.requeue],
        srun=" \\\n  ".join(["srun", *cpus, *_container(frozen, job, working_directory), command]),
    )


def render(frozen: FrozenLaunch, ranks: Ranks, job: SlurmJob, working_directory: Path) -> str:
    """Render the batch script of a command on one or several ranks."""
    signals = tuple(dict.fromkeys(("TERM", job.signal)))
    # For a process that a signal ends before its handlers are installed, the shell reports 128 plus the signal.
    stopped = [REQUEUE_EXIT, *(128 + Signals[f"SIG{name}"] for name in signals)]
    environment = {**frozen.environment, STOP_SIGNALS_VARIABLE: ",".join((*signals, "INT"))}
    return _SCRIPT.format(
        **_common(frozen, job, environment),
        command=frozen.command,
        run=_one_line("run_dir", frozen.target),
        submission=shlex.join(submission(frozen, job)),
        directives="\n".join(_directives(frozen, ranks, job, working_directory)),
        latest=shlex.quote(str(frozen.target / CHECKPOINTS / LATEST_FILE)) if frozen.trains else "/dev/null",
        trapped=" ".join(signals),
        grace=ranks.grace,
        srun=_srun(frozen, ranks, job, working_directory),
        stopped="|".join(map(str, stopped)),
        requeue_exit=REQUEUE_EXIT,
        attempts=job.attempts if job.requeue else 1,
        requeue=_REQUEUE if job.requeue else ": # left to the site's RequeueExit",
    )


def submission(frozen: FrozenLaunch, job: SlurmJob) -> list[str]:
    """Return the command that submits the script: a dependency is of this submission, not of the script."""
    after = [f"--dependency=afterok:{':'.join(job.after)}", "--kill-on-invalid-dep=yes"] if job.after else []
    return ["sbatch", "--parsable", *after, str(script_path(frozen))]


def _common(frozen: FrozenLaunch, job: SlurmJob, environment: Mapping[str, str]) -> dict[str, str]:
    """Values that both scripts have."""
    python = job.python or ("python" if job.container.image else sys.executable)
    return {
        "script": shlex.quote(str(script_path(frozen))),
        "launch": shlex.quote(str(frozen.directory)),
        "setup": "".join(f"\n{_one_line('--setup', line)}" for line in job.setup) + ("\n" if job.setup else ""),
        "environment": " ".join(f"{key}={shlex.quote(_one_line(key, value))}" for key, value in environment.items()),
        "python": shlex.quote(_one_line("--python", python)),
    }


def script_path(frozen: FrozenLaunch) -> Path:
    """Path of a launch's batch script."""
    return frozen.directory / "job.sbatch"


def _directives(
    frozen: FrozenLaunch, ranks: Ranks, job: SlurmJob, working_directory: Path, array: int | None = None
) -> list[str]:
    """Lines `#SBATCH --key=value`."""
    if "\\" in str(frozen.directory):
        raise UserError(
            f"{frozen.directory} cannot hold the job's log: sbatch replaces no %j in a file name with a backslash; "
            "choose a directory without one"
        )
    tasks = ranks.per_node if ranks.starter == "srun" else 1
    cpus = None if ranks.cpus_per_rank is None else ranks.cpus_per_rank * ranks.per_node // tasks
    settings = {
        "job-name": job.name or f"scmdm-{frozen.target.name}",
        "nodes": ranks.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cpus,
        "gpus-per-node": ranks.gpus_per_node or None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "array": f"0-{array - 1}" if array is not None else None,
        "signal": f"{'' if array is None else 'B:'}{job.signal}@{job.signal_before}" if job.signal_before else None,
        "chdir": working_directory,
        # In file names, sbatch replaces patterns such as %j, and %% by %.
        "output": f"{str(frozen.directory).replace('%', '%%')}/job-{'%j' if array is None else '%A-%a'}.log",
        "open-mode": "append",
    }
    given = [(key, str(value)) for key, value in settings.items() if value is not None]
    # A flag such as `exclusive` has no value.
    others = [line.partition("=")[::2] if "=" in line else (line, None) for line in job.sbatch]
    return [_directive(key, value) for key, value in [*given, ("requeue", None), *others]]


def _directive(key: str, value: str | None) -> str:
    if not re.fullmatch(r"[a-zA-Z][\w-]*", key):
        raise UserError(f"--sbatch {key!r} is not possible; it must be KEY=VALUE or KEY, with a long option of sbatch")
    return f"#SBATCH --{key}" + ("" if value is None else f"={_sbatch_quote(_one_line(f'--{key}', value))}")


def _sbatch_quote(value: str) -> str:
    """Quote for a directive: sbatch parses quotes as a shell does, but backslashes escape in single quotes, too."""
    return shlex.quote(value.replace("\\", "\\\\"))


def _one_line(key: str, value: object) -> str:
    text = str(value)
    if not text.isprintable():
        raise UserError(
            f"{key}={text!r} is not possible in a batch script; it must be one line of printable characters"
        )
    return text


def _srun(frozen: FrozenLaunch, ranks: Ranks, job: SlurmJob, working_directory: Path) -> str:
    """Return the command that starts the ranks, with one option per line."""
    lines = ["srun --kill-on-bad-exit=0", f"--wait={ranks.grace}"]
    if ranks.cpus_per_rank is not None:
        lines.append('--cpus-per-task="$SLURM_CPUS_PER_TASK"')  # since SLURM 22.05 srun does not take it from the job
    if ranks.starter == "srun":
        lines.append('--output="${launch//%/%%}/logs/start-$((attempt + 1))-rank-%t.log"')
    lines += _container(frozen, job, working_directory)
    node = [
        '"${python[@]}" -m scmdm.launch.node',
        f"--starter {ranks.starter}",
        f"--ranks-per-node {ranks.per_node}",
        '--head "$head" --port "$port"',
        f"--start-timeout {ranks.start_timeout}",
        '--logs "$launch/logs/start-$((attempt + 1))"',
        f"--stacks {shlex.quote(str(frozen.stacks))}",
    ]
    *words, config = frozen.arguments('"$launch/config.yaml"')
    command = " ".join([*(shlex.quote(_one_line("an argument", word)) for word in words), config])
    return " \\\n  ".join([*lines, *node, f"-- {command}"])


def _container(frozen: FrozenLaunch, job: SlurmJob, working_directory: Path) -> list[str]:
    container, quote = job.container, shlex.quote
    if container.image is None:
        return []
    places = (working_directory, frozen.target if frozen.trains else frozen.directory.parents[1])
    own = [f"{path}:{path}" for path in places]
    for path in places:
        if re.search("[:,]", str(path)):
            raise UserError(f"{path} cannot be mounted in a container; choose a directory without ',' and ':'")
    mounts = quote(_one_line("--container-mount", ",".join([*dict.fromkeys(own), *container.mount])))
    image = quote(_one_line("--container-image", container.image))
    if container.runtime == "pyxis":
        return [
            f"--container-image={image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={quote(str(working_directory))}",
        ]
    return [f"apptainer exec --nv --bind {mounts} --pwd {quote(str(working_directory))} {image}"]
