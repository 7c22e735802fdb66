"""What each rank does, counted, for growing numbers of ranks: nothing may grow with their number.

Real processes (gloo) run one adaptation with a validation and a save. Simulated ranks run one step on fake process
groups. The number of shards that a machine reads follows from the library's own partition of the samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks.counting import MIB, Collectives
from benchmarks.scale_rank import local_part
from benchmarks.step import QM9, make_engine_step
from benchmarks.timing import save
from scmdm.data.preparation.shard_writer import Description, write_dataset
from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.system.hashing import CHUNK_BYTES
from scmdm.system.terminal import Terminal

RANKS, SIMULATED = (1, 2, 4, 8), (1, 8, 64, 256, 1024)
CONSTANT, SHARE = "constant", "1/N"
_SYMBOLS, _LENGTH, _SAMPLES, _VALIDATED = "abcdefghijklmnopqrstuvwxyz0123", 32, 2048, 64
_SHARDS, _SHARD_SAMPLES = 1024, 128  # of the data set whose shards are counted
_MICRO_BATCH = 2
_CHUNK = CHUNK_BYTES  # a rank verifies whole chunks
_MODULES = 14 * MIB  # files of Python modules and of data, which every rank reads
_SLACK = 1.25  # of a count: small files, uneven shares


@dataclass(frozen=True)
class Measurement:
    """A row of the table: counts by number of ranks, and what design allows them to be."""

    name: str
    allowed: str  # CONSTANT or SHARE
    unit: float = 1.0
    base: float = 0.0  # part of a SHARE that stays: the same small files on every rank; CONSTANT: too little to matter
    fewest: int = 1  # ranks from which it is compared

    def compared(self, counts: Mapping[int, float]) -> dict[int, float]:
        """Counts from the fewest ranks."""
        return {ranks: count for ranks, count in counts.items() if ranks >= self.fewest}


COUNTED = (
    Measurement("hashed at opening", SHARE, MIB, base=_CHUNK + MIB),
    Measurement("read at opening", SHARE, MIB, base=_CHUNK + _MODULES),
    Measurement("hashed at the save", SHARE, MIB, base=MIB),
    Measurement("validated sequences", SHARE),
    Measurement("collectives of a step", CONSTANT, fewest=2),
    Measurement("bytes of these collectives", CONSTANT, MIB, fewest=2),
    Measurement("peak memory", CONSTANT, MIB),
)
EVALUATED = (
    Measurement("hashed to evaluate", SHARE, MIB, base=_CHUNK + MIB),
    Measurement("shared weights of a rank", SHARE, MIB, base=MIB),
    Measurement("evaluated sequences", SHARE),
    Measurement("samples drawn", SHARE),
)
ZERO = (Measurement("exchanged at a save, ZeRO-3", CONSTANT, MIB, base=MIB, fewest=2),)
SIMULATION = (
    Measurement("training state of a rank", SHARE, MIB, base=MIB),
    Measurement("collectives of a step", CONSTANT, fewest=2),
    Measurement("bytes of these collectives", CONSTANT, MIB, fewest=2),
)
DOWNLOADS = (
    Measurement("shards, N canonical nodes", SHARE, base=2),
    Measurement("shards, 1 canonical node", SHARE, base=2),
)


def shape_of(counts: Mapping[int, float], base: float = 0.0) -> str:
    """Return how counts, the largest of any rank, behave from the smallest to the largest number of ranks."""
    few, many = min(counts), max(counts)
    first, last = counts[few], counts[many]
    if last <= (first - base) * few / many * _SLACK + base and last < first:
        return SHARE
    return CONSTANT if last <= max(first * _SLACK, base) else f"x {last / max(first, 1):.1f}"


def is_allowed(measured: Measurement, counts: Mapping[int, float]) -> bool:
    """Whether a measurement grows no faster than it may."""
    compared = measured.compared(counts)
    found = shape_of(compared, measured.base) if compared else CONSTANT
    return found in (SHARE, measured.allowed)


def main() -> None:
    """Count in real processes and on simulated ranks, and print and save the tables."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        base = write_base(Path(name))
        for title, rows, count in (
            ("counted in real processes", COUNTED, count_adaptation),
            ("counted in evaluations", EVALUATED, count_evaluation),
            ("counted with DeepSpeed", ZERO, count_zero),
        ):
            report(title, rows, {ranks: count(Path(name), base, ranks) for ranks in RANKS})
    report("counted on simulated ranks", SIMULATION, {ranks: simulate(ranks) for ranks in SIMULATED})
    report("shards that one machine reads in an epoch", DOWNLOADS, {n: shards_read(n) for n in SIMULATED})


def report(title: str, rows: Sequence[Measurement], counts: Mapping[int, Mapping[str, float]]) -> None:
    """Print and save a table with one column per number of ranks."""
    table = Table(title=f"{title}: largest count of any rank, by number N", title_justify="left")
    for heading in ("", *(str(ranks) for ranks in counts), "allowed", "found"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        by_ranks = {ranks: found[row.name] for ranks, found in counts.items()}
        unit = ", MiB" if row.unit == MIB else ""
        cells = (f"{count / row.unit:,.2f}" if unit else f"{count:,.0f}" for count in by_ranks.values())
        found = shape_of(row.compared(by_ranks), row.base) if max(by_ranks) >= row.fewest else ""
        table.add_row(row.name + unit, *cells, row.allowed, found + ("" if is_allowed(row, by_ranks) else " !"))
    Terminal().print(table)
    save(f"scale {title}", {"counts": {str(ranks): dict(found) for ranks, found in counts.items()}})


def count_adaptation(root: Path, base: Path, ranks: int) -> dict[str, float]:
    """Adapt the base on a number of ranks; returns the largest count of any rank."""
    return _count(root / f"ranks-{ranks}", ranks, *_adaptation(root, base, ranks, "fsdp2"))


def count_zero(root: Path, base: Path, ranks: int) -> dict[str, float]:
    """Adapt the base with DeepSpeed, whose stage 3 divides parameters not by rows."""
    arguments = _adaptation(root, base, ranks, "deepspeed")
    return _count(root / f"deepspeed-{ranks}", ranks, *arguments, "deepspeed.stage=3", "train.validate_every=0")


def count_evaluation(root: Path, base: Path, ranks: int) -> dict[str, float]:
    """Evaluate the base with weights that all ranks share."""
    place = root / f"evaluation-{ranks}"
    keys = [f"out={place / 'result.json'}", f"shards={ranks}", "domain=text", "split=validation", "device=cpu"]
    sizes = [f"num={_VALIDATED}", f"nelbo_samples={_VALIDATED}", "nelbo_draws=1", "sampler.steps=4", "batch_size=8"]
    return _count(place, ranks, "evaluate", str(base), *keys, *sizes)


def _adaptation(root: Path, base: Path, ranks: int, engine: str) -> list[str]:
    # One micro-batch on each rank: accumulation would repeat its collectives.
    batch = f"train.global_batch_size={_MICRO_BATCH * ranks}"
    run = root / f"run-{engine}-{ranks}"
    own = [f"base={base}", "self_conditioning.rate=1", f"engine={engine}", batch]
    return ["adapt", str(root / "empty.yaml"), *_keys(root, run), *own]


def _count(place: Path, ranks: int, *arguments: str) -> dict[str, float]:
    """Run a command on a number of ranks; returns the largest count of any rank."""
    place.mkdir()
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "benchmarks.scale_rank",
    ]
    _run([*command, str(place), *arguments])
    found = [json.loads(path.read_text()) for path in sorted(place.glob("rank_*.json"))]
    assert len(found) == ranks
    return {name: max(counts[name] for counts in found) for name in found[0]}


def write_base(root: Path, *, width: int = 384, layers: int = 6) -> Path:
    """Train a base, whose checkpoint is then adapted and evaluated."""
    rows = np.random.default_rng(0).integers(4, 4 + len(_SYMBOLS), (_SAMPLES, _LENGTH)).tolist()
    description = Description("scale", _LENGTH, "loss", "loss", {})
    splits = {"train": rows, "validation": rows[:_VALIDATED]}
    write_dataset(root / "data", CharacterTokenizer(_SYMBOLS), splits, description, shard_bytes=1 << 14)
    (root / "empty.yaml").write_text("{}\n")
    model = [f"model.width={width}", f"model.layers={layers}", "model.heads=8", "train.validate_every=0"]
    _run(["-m", "scmdm", "train", str(root / "empty.yaml"), *_keys(root, root / "base"), *model])
    return root / "base"


def _keys(root: Path, run: Path) -> list[str]:
    given = {
        "run_dir": run,
        "data.path": root / "data",
        "train.steps": 4,
        "train.global_batch_size": _MICRO_BATCH,
        "train.micro_batch_size": _MICRO_BATCH,
        "train.validation_samples": _VALIDATED,
        "train.validate_every": 4,
        "train.checkpoint_every": 1000,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "precision": "float32",
    }
    return [f"{name}={value}" for name, value in given.items()]


def _run(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments[:6])} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """Make this process rank 0 of `size` ranks that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate(ranks: int) -> dict[str, float]:
    """Count one adaptation step of rank 0 of `ranks`, with one sequence for each rank.

    The model is as wide as there are ranks at most: FSDP2 pads parameters of fewer rows to one row for each rank.
    """
    with fake_ranks(ranks):
        shape = replace(QM9, model=replace(QM9.model, width=1024, layers=2), batch=1, micro=1)
        engine, step = make_engine_step(shape, rate=1.0, engine="fsdp2", ranks=ranks)
        step()  # the first one also sets the engine up
        with Collectives() as counted:
            step()
        held = sum(local_part(value).nbytes for value in engine.parameters().values())
    return {
        SIMULATION[0].name: 4.0 * held,
        SIMULATION[1].name: counted.count,
        SIMULATION[2].name: counted.bytes,
    }


def shards_read(machines: int) -> dict[str, float]:
    """Count the shards that the first of `machines` machines needs in one epoch."""
    return {
        DOWNLOADS[0].name: _shards_read(machines, canonical=machines),
        DOWNLOADS[1].name: _shards_read(machines, canonical=1),
    }


def _shards_read(machines: int, *, canonical: int) -> int:
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    samples, ranks_per_machine = _SHARDS * _SHARD_SAMPLES, 8
    parts = get_partitions("relaxed", samples, canonical, machines, ranks_per_machine, 1, 1)
    order = get_shuffle("py1e", np.full(_SHARDS, _SHARD_SAMPLES), canonical, 0, 0, 1 << 18)
    own = parts[0].ravel()
    return len(np.unique(order[own[own >= 0]] // _SHARD_SAMPLES))
