"""The batch script of a job: readable, complete, and good for `sbatch` by hand."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from signal import Signals

from scmdm.config.launch import Ranks, SlurmJob
from scmdm.launch.freeze import Frozen
from scmdm.system.signals import REQUEUE_EXIT, VARIABLE

_SCRIPT = """\
#!/usr/bin/env bash
# scmdm {command} into {run}
# Written by `scmdm launch slurm`; `sbatch {script}` submits it again.
{directives}

launch={launch}
checkpoints={checkpoints}
{setup}
# `scmdm` as it was at the launch, whatever the image or the working directory holds.
python=(env {environment} {python})

# The address by which SLURM itself reaches the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$((10000 + SLURM_JOB_ID % 20000))
attempt=${{SLURM_RESTART_COUNT:-0}}
echo "scmdm: job $SLURM_JOB_ID, start $((attempt + 1)), on $SLURM_JOB_NODELIST, rendezvous at $head:$port"

# The ranks get the signals themselves. Without these traps the shell would not live to see how they end.
trap : {trapped}

# A task that ends, whatever its status, gives the others {grace} s: who saves ends by itself, who hangs is killed.
{srun}
status=$?

requeue() {{
  # scontrol would bring back even a job that was cancelled while its ranks saved.
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
    echo "scmdm: the run directory belongs to another run, see above: not requeued"
    exit 75
    ;;
  {stopped})
    echo "scmdm: stopped by a signal (status $status)"
    status={requeue_exit}
    requeue
    ;;
esac
# A failure. So many in a row at the same checkpoint end the job; progress between them makes it start counting again.
at=$(cat "$checkpoints/latest" 2>/dev/null || echo "no checkpoint")
echo "$at" >>"$launch/failures-$SLURM_JOB_ID"
failures=$(grep -cxF "$at" "$launch/failures-$SLURM_JOB_ID")
echo "scmdm: failed with status $status ($failures of {attempts} at $at); the ranks' logs are in $launch/logs"
[ "$failures" -lt {attempts} ] && requeue
exit "$status"
"""


_PREPARATION = """\
#!/usr/bin/env bash
# scmdm prepare of {target} by the tasks of an array: each has a share of the parts, and takes what nobody is at.
# Written by `scmdm launch slurm`; `sbatch {script}` goes on where it stopped.
{directives}

launch={launch}
{setup}
# `scmdm` as it was at the launch, whatever the image or the working directory holds.
python=(env {environment} {python})
start=$((${{SLURM_RESTART_COUNT:-0}} + 1))
echo "scmdm: task $SLURM_ARRAY_TASK_ID of {tasks}, job $SLURM_JOB_ID, start $start, on $SLURM_JOB_NODELIST"

# Shortly before the time limit. Finished parts stay, so there is nothing to save.
trap 'echo "scmdm: requeued before the time limit"; {requeue}' {signal}
{srun} &
wait $!
"""


def render_preparation(frozen: Frozen, ranks: Ranks, job: SlurmJob, working_directory: Path, tasks: int) -> str:
    """The script of a preparation."""
    setup = "".join(f"{line}\n" for line in job.setup)
    directives = [*_directives(frozen, ranks, job, working_directory, tasks)]
    command = '"${python[@]}" -m scmdm prepare "$launch/config.yaml" ' + f'slice="$SLURM_ARRAY_TASK_ID/{tasks}"'
    cpus = [] if ranks.cpus_per_rank is None else ['--cpus-per-task="$SLURM_CPUS_PER_TASK"']
    return _PREPARATION.format(
        target=frozen.target,
        script=script_path(frozen),
        directives="\n".join(f"#SBATCH --{line}" for line in directives),
        launch=shlex.quote(str(frozen.directory)),
        setup=f"\n{setup}" if setup else "",
        environment=_assignments(frozen.environment),
        python=shlex.quote(_python(job)),
        tasks=tasks,
        requeue=_requeue(job),
        signal=job.signal,
        srun=" \\\n  ".join(["srun", *cpus, *_container(frozen, job, working_directory), command]),
    )


def render(frozen: Frozen, ranks: Ranks, job: SlurmJob, working_directory: Path) -> str:
    """The script of a launch."""
    quote = shlex.quote
    signals = tuple(dict.fromkeys(("TERM", job.signal)))
    # Also a process that had no handler yet was stopped, not broken; the shell adds 128.
    stopped = [REQUEUE_EXIT, *(128 + Signals[f"SIG{name}"] for name in signals)]
    environment = {**frozen.environment, VARIABLE: ",".join((*signals, "INT"))}
    setup = "".join(f"{line}\n" for line in job.setup)
    return _SCRIPT.format(
        command=frozen.command,
        run=frozen.target,
        script=script_path(frozen),
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(frozen, ranks, job, working_directory)),
        launch=quote(str(frozen.directory)),
        checkpoints=quote(str(frozen.target / "checkpoints")),
        setup=f"\n{setup}" if setup else "",
        environment=_assignments(environment),
        python=quote(_python(job)),
        trapped=" ".join(signals),
        grace=ranks.grace,
        srun=_srun(frozen, ranks, job, working_directory),
        requeue=_requeue(job),
        stopped="|".join(map(str, stopped)),
        requeue_exit=REQUEUE_EXIT,
        attempts=job.attempts if job.requeue else 1,
    )


def _assignments(environment: Mapping[str, str]) -> str:
    return " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())


def _python(job: SlurmJob) -> str:
    return job.python or ("python" if job.container.image else sys.executable)


def _requeue(job: SlurmJob) -> str:
    return 'scontrol requeue "$SLURM_JOB_ID"' if job.requeue else ": # left to the site's RequeueExit"


def script_path(frozen: Frozen) -> Path:
    return frozen.directory / "job.sbatch"


def _directives(
    frozen: Frozen, ranks: Ranks, job: SlurmJob, working_directory: Path, array: int | None = None
) -> list[str]:
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
        "output": f"{frozen.directory}/job-{'%j' if array is None else '%A-%a'}.log",
        "open-mode": "append",
    }
    given = [f"{key}={value}" for key, value in settings.items() if value is not None]
    return [*given, "requeue", *job.sbatch]


def _srun(frozen: Frozen, ranks: Ranks, job: SlurmJob, working_directory: Path) -> str:
    """The command that starts the ranks, an option a line."""
    lines = ["srun --kill-on-bad-exit=0", f"--wait={ranks.grace}"]
    if ranks.cpus_per_rank is not None:
        lines.append('--cpus-per-task="$SLURM_CPUS_PER_TASK"')  # srun does not take it from the job since SLURM 22.05
    if ranks.starter == "srun":
        lines.append('--output="$launch/logs/start-$((attempt + 1))-rank-%t.log"')
    lines += _container(frozen, job, working_directory)
    node = [
        '"${python[@]}" -m scmdm.launch.node',
        f"--starter {ranks.starter}",
        f"--ranks-per-node {ranks.per_node}",
        '--head "$head" --port "$port"',
        f"--start-timeout {ranks.start_timeout}",
        '--logs "$launch/logs/start-$((attempt + 1))"',
    ]
    command = f'-- {frozen.command} "$launch/config.yaml"'
    return " \\\n  ".join([*lines, *node, command])


def _container(frozen: Frozen, job: SlurmJob, working_directory: Path) -> list[str]:
    container, quote = job.container, shlex.quote
    if container.image is None:
        return []
    own = [f"{path}:{path}" for path in (working_directory, frozen.target)]
    mounts = quote(",".join([*dict.fromkeys(own), *container.mount]))
    if container.runtime == "pyxis":
        return [
            f"--container-image={quote(container.image)}",
            f"--container-mounts={mounts}",
            f"--container-workdir={quote(str(working_directory))}",
        ]
    return [f"apptainer exec --nv --bind {mounts} --pwd {quote(str(working_directory))} {quote(container.image)}"]
