"""Time from `srun` to the end of an adaptation's first step on all ranks, and what each rank has read until then.

`python -m benchmarks.slurm_start BASE DATA RANKS [TREE ...]` inside the environment of a SLURM (`SLURM_CONF`) starts so
many ranks with `srun` for each source tree of scmdm in turn, three times, and prints medians by tree.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROUNDS, _BEGIN = 3, "SRUN_BEGAN"
_LIMIT_S = 1800  # of one start
_KEYS = ("train.steps=4", "train.validate_every=0", "precision=float32", "engine=fsdp2", "device=cpu")


def main(base: str, data: str, ranks: int, trees: list[Path]) -> None:
    """Start the ranks of each tree, round by round, and print medians."""
    found: dict[Path, list[dict[str, float]]] = {tree: [] for tree in trees}
    with tempfile.TemporaryDirectory(dir=".") as name:
        for number in range(_ROUNDS):
            for at, tree in enumerate(trees):
                place = Path(name).absolute() / f"{number}-{at}"
                place.mkdir()
                found[tree].append(start(base, data, ranks, tree, place))
                print(tree.name, found[tree][-1], flush=True)
    for tree, rounds in found.items():
        print(tree.name, {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}, flush=True)


def start(base: str, data: str, ranks: int, tree: Path, place: Path) -> dict[str, float]:
    """Start the ranks once; returns the largest count of any rank."""
    (place / "empty.yaml").write_text("{}\n")
    batch = [f"train.global_batch_size={ranks}", "train.micro_batch_size=1"]
    keys = [*_KEYS, *batch, f"base={base}", f"data.path={data}", f"run_dir={place / 'run'}"]
    own = {_BEGIN: str(time.time()), "PYTHONPATH": str(tree), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    own["MASTER_PORT"] = str(20000 + int(time.time() * 10) % 20000)
    # `-P`: this file's folder has modules with names of Python's own.
    rank = [sys.executable, "-P", str(Path(__file__).absolute()), str(place), "adapt", str(place / "empty.yaml"), *keys]
    # The ranks wait for each other; if one fails, the others are ended.
    srun = ["srun", "--nodes=1", f"--ntasks={ranks}", "--overcommit", "--kill-on-bad-exit=1", f"--output={place}/log"]
    command = ["timeout", "--foreground", "--kill-after=60", str(_LIMIT_S), *srun, *rank]
    done = subprocess.run(command, env={**os.environ, **own})
    files = sorted(place.glob("rank-*.json"))
    if len(files) != ranks:
        sys.exit(f"srun ended with status {done.returncode}:\n{(place / 'log').read_text()[-3000:]}")
    counts = [json.loads(file.read_text()) for file in files]
    return {part: max(one[part] for one in counts) for part in counts[0]}


def run_rank(place: Path, arguments: list[str]) -> int:
    """Run the command as a task of `srun` until the first step is done on all ranks."""
    ranks = int(os.environ["SLURM_NTASKS"])
    os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=os.environ["SLURM_LOCALID"])
    from scmdm import cli
    from scmdm.training import trainer

    step = trainer.train_step

    def first_step(*given: Any, **options: Any) -> Any:
        step(*given, **options)
        read = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
        seconds = {"seconds": time.time() - float(os.environ[_BEGIN]), "CPU seconds": time.process_time()}
        unfinished = place / f".rank-{os.environ['RANK']}"
        unfinished.write_text(json.dumps({**seconds, "MiB read": read / 2**20}))
        unfinished.rename(place / f"rank-{os.environ['RANK']}.json")
        while len(list(place.glob("rank-*.json"))) < ranks:
            time.sleep(0.1)
        os._exit(0)

    trainer.train_step = first_step
    return cli.main(arguments)


if __name__ == "__main__":
    if _BEGIN in os.environ:
        sys.exit(run_rank(Path(sys.argv[1]), sys.argv[2:]))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [Path(tree).absolute() for tree in sys.argv[4:] or ["."]])
