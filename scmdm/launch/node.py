"""Launcher on each machine of a job: starts torchrun for the machine's ranks, or one rank as a task of srun.

    python -m scmdm.launch.node --ranks-per-node 8 --head HOST --port 12345 --logs DIR --stacks DIR -- adapt config.yaml

The exit status is that of the failed rank (torchrun's own is always 1), or 85 if signals stopped all failed ranks.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scmdm.errors import UserError
from scmdm.launch.rank import rank_module
from scmdm.runtime.flight_recorder import recorder_environment
from scmdm.system.signals import REQUEUE_EXIT, stop_signals


@dataclass(frozen=True)
class SlurmNode:
    """This machine's place in the SLURM job; without SLURM, the job has one machine."""

    index: int
    count: int
    job: str
    start: int

    @staticmethod
    def current() -> SlurmNode:
        read = os.environ.get
        job, start = read("SLURM_JOB_ID", str(os.getpid())), int(read("SLURM_RESTART_COUNT", "0"))
        return SlurmNode(int(read("SLURM_NODEID", "0")), int(read("SLURM_STEP_NUM_NODES", "1")), job, start)

    @property
    def name(self) -> str:
        return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks of this machine, wait for them and return the exit status."""
    # The ranks inherit the blocked signals and unblock them once their handlers are installed: no signal is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    options = _parser().parse_args(arguments)
    with suppress(OSError):  # the ranks report a directory that cannot be written
        options.stacks.mkdir(parents=True, exist_ok=True)
    os.environ.update(recorder_environment(os.environ, options.stacks))
    if options.starter == "srun":
        _become_rank(options)
    status = 1
    for attempt in range(options.attempts):
        status = _torchrun(options, attempt)
        if status in (0, REQUEUE_EXIT):
            break
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scmdm.launch.node", description=__doc__)
    parser.add_argument("--starter", choices=("torchrun", "srun"), default="torchrun")
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--head", default="localhost", help="address of the first machine")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--start-timeout", type=int, default=600, help="seconds to wait for the other machines")
    parser.add_argument("--logs", type=Path, required=True, help="directory of the ranks' logs")
    parser.add_argument("--stacks", type=Path, required=True, help="directory of NCCL's flight recorder")
    parser.add_argument("--attempts", type=int, default=1, help="maximum number of starts if ranks fail")
    parser.add_argument("command", nargs="+", help="arguments of scmdm, after --")
    return parser


def _become_rank(options: argparse.Namespace) -> None:
    os.environ.update(rank_environment(os.environ, options.head, options.port))
    os.execv(sys.executable, [sys.executable, "-m", rank_module(options.command[0]), *options.command])


def rank_environment(slurm: Mapping[str, str], head: str, port: int) -> dict[str, str]:
    """Return torch.distributed's variables for a task of srun."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(int(slurm["SLURM_STEP_NUM_TASKS"]) // int(slurm["SLURM_STEP_NUM_NODES"])),
        "MASTER_ADDR": head,
        "MASTER_PORT": str(port),
    }


def _torchrun(options: argparse.Namespace, attempt: int) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    node = SlurmNode.current()
    stop = _forward_signals()
    try:
        torchrun(torchrun_arguments(options, node, attempt))
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _explain(node, ended, options.logs)
    except RendezvousError as error:
        limit, reason = options.start_timeout, f"{type(error).__name__} {error}".strip()
        print(
            f"scmdm: on {node.name}: no rendezvous of {node.count} nodes (limit {limit} s): {reason}", file=sys.stderr
        )
        return 1
    finally:
        stop.set()
    return 0


def torchrun_arguments(options: argparse.Namespace, node: SlurmNode, attempt: int = 0) -> list[str]:
    """Arguments of torchrun on one machine of the job."""
    wait = options.start_timeout
    rendezvous = ["--standalone"]
    if node.count > 1:
        conf = f"is_host={str(node.index == 0).lower()},join_timeout={wait},read_timeout={wait}"
        rendezvous = [
            f"--nnodes={node.count}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={options.head}:{options.port}",
            f"--rdzv-id={node.job}.{node.start}",
            f"--rdzv-conf={conf}",
        ]
    logs = options.logs / (node.name if attempt == 0 else f"{node.name}-attempt-{attempt + 1}")
    logs.mkdir(parents=True, exist_ok=True)
    module = rank_module(options.command[0])
    output = [f"--log-dir={logs}", "--redirects=3", "--tee=3", "--log-line-prefix-template=[rank ${rank}] "]
    return [*rendezvous, f"--nproc-per-node={options.ranks_per_node}", *output, "-m", module, *options.command]


def _explain(node: SlurmNode, ended: Mapping[int, int], logs: Path) -> int:
    status = exit_status(ended.values())
    if status != REQUEUE_EXIT:
        causes = ", ".join(f"rank {rank}: {describe_exit(code)}" for rank, code in sorted(ended.items()))
        print(f"scmdm: ranks failed on {node.name}: {causes}; logs in {logs}", file=sys.stderr, flush=True)
    return status


def exit_status(codes: Iterable[int]) -> int:
    """Combined exit status of ranks: 85 if all of them were stopped by a signal, else that of the likely cause."""
    # A process that ends its own worker processes on a signal ends with 128 plus its number.
    stopped = {REQUEUE_EXIT, *(-number for number in stop_signals()), *(128 + number for number in stop_signals())}
    failed = [code for code in codes if code not in stopped]
    if not failed:
        return REQUEUE_EXIT
    # Ranks that lose their connection to a killed rank end with 1; the negative code is the cause.
    worst = min(failed)
    return worst if worst > 0 else 128 - worst


def describe_exit(code: int) -> str:
    """Describe a process's exit code."""
    if code >= 0:
        return f"exit status {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def _forward_signals() -> threading.Event:
    """Forward stop signals from this process to the ranks, which torchrun would kill after 30 s.

    A signal that comes before torchrun has started a rank is kept until then.
    """
    done = threading.Event()

    def forward() -> None:
        kept = None
        while not done.is_set():
            if (found := signal.sigtimedwait(stop_signals(), 0.2)) is not None:
                kept = found.si_signo
            if kept is None or not (ranks := _children()):
                continue
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, kept)
            kept = None

    threading.Thread(target=forward, name="signals", daemon=True).start()
    return done


def _children() -> list[int]:
    main = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{main}/task/{main}/children").read_text().split()]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as mistake:
        sys.exit(f"scmdm: error: {mistake}")
