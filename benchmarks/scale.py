"""What each rank does, counted, for growing numbers of ranks: nothing may grow with their number.

`python -m benchmarks scale [--ranks 1,2,4,8] [--parts ranks,zero,machines,simulated,shares]` prints each table as soon
as it is counted. Real processes (gloo) run an adaptation with a validation and a save, then an evaluation of what they
saved. Simulated ranks run a step on fake process groups. Of many ranks, shares follow from the functions that divide
the work, and the shards that a machine reads from the library's own partition of the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks.counting import MIB, Collectives, fake_ranks, following_resizes
from benchmarks.scale_rank import local_part
from benchmarks.step import QM9, make_engine_step
from benchmarks.timing import save
from scmdm.checkpoint.model_verification import balance
from scmdm.checkpoint.seal import SealedPart
from scmdm.config.data import DataConfig
from scmdm.data.loader import build_loader, canonical_nodes, epochs
from scmdm.data.manifest import Manifest
from scmdm.data.mixture import DataMixture, open_data
from scmdm.data.preparation.shard_writer import Description, write_dataset
from scmdm.data.tokenizers import CharacterTokenizer
from scmdm.observability.step_timer import PARTS as PARTS_OF_A_STEP
from scmdm.observability.step_timer import summarize_parts
from scmdm.planner.activation_memory import LiveBytes
from scmdm.runtime.divided_work import share_of
from scmdm.system.hashing import CHUNK_BYTES, chunk_ends
from scmdm.system.process_group import gather_object
from scmdm.system.terminal import Terminal
from scmdm.training.validation import ValidationRows, ValidationSet

RANKS, SIMULATED = (1, 2, 4, 8), (1, 8, 64, 256, 1024)
CONSTANT, SHARE = "constant", "1/N"
_SYMBOLS, _LENGTH, _SAMPLES, _VALIDATED = "abcdefghijklmnopqrstuvwxyz0123", 32, 2048, 64
_SHARDS, _SHARD_SAMPLES = 1024, 128  # of the data set whose shards are counted
_MICRO_BATCH = 2
_CHUNK = CHUNK_BYTES  # a rank verifies whole chunks
_MODULES = 14 * MIB  # files of Python modules and of data, which every rank reads
_PASSES = 5  # times that all headers are read; each time a rank opens its share of the files
_WIDTH = 140  # columns of a table in a file
_SHARED, _EPOCH_BATCH = 4096, 32  # sequences
_BASE_BYTES = 32 * 2**30  # of a model of 8 billion parameters
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
    Measurement("sequences validated at once", CONSTANT),
    Measurement("collectives of a step", CONSTANT, fewest=2),
    Measurement("bytes of these collectives", CONSTANT, MIB, fewest=2),
    Measurement("peak memory", CONSTANT, MIB),
)
EVALUATED = (
    Measurement("hashed to evaluate", SHARE, MIB, base=_CHUNK + MIB),
    Measurement("shared weights of a rank", SHARE, MIB, base=MIB),
    Measurement("evaluated sequences", SHARE),
    Measurement("samples drawn", SHARE),
    Measurement("files of tensors opened", CONSTANT, base=_PASSES + 1),
    Measurement("bytes of their headers", CONSTANT, MIB, base=MIB),
    Measurement("peak memory of an evaluation", CONSTANT, MIB),
)
ZERO = (Measurement("exchanged at a save, ZeRO-3", CONSTANT, MIB, base=MIB, fewest=2),)
SIMULATION = (
    Measurement("training state of a rank", SHARE, MIB, base=MIB),
    Measurement("collectives of a step", CONSTANT, fewest=2),
    Measurement("bytes of these collectives", CONSTANT, MIB, fewest=2),
    Measurement("peak memory of a step", CONSTANT, MIB),
)
GATHERED = (
    Measurement("bytes gathered by a log row", CONSTANT),
    Measurement("bytes gathered at the start", CONSTANT),
)
SHARES = (
    Measurement("hashed to open 32 GiB", SHARE, MIB, base=_CHUNK),
    Measurement("validated sequences of 4,096", SHARE),
    Measurement("samples of 4,096", SHARE),
    Measurement("sent by rank 0 to divide 32 GiB", CONSTANT, MIB, base=MIB),
)
MACHINES = (Measurement("shards downloaded", SHARE, base=2), Measurement("bytes downloaded", SHARE, MIB, base=MIB))
DOWNLOADS = (
    Measurement("shards, N canonical nodes", SHARE, base=2),
    Measurement("shards, 1 canonical node", CONSTANT),  # for comparison: a machine reads nearly all
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


def main(arguments: Sequence[str] = ()) -> int:
    """Count in real processes and on simulated ranks, and print and save the tables.

    Returns 1 if a count grows faster than it may, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="numbers of real processes")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is counted")
    options = parser.parse_args(list(arguments))
    parts, numbers = options.parts.split(","), options.ranks.split(",")
    if wrong := [number for number in numbers if not number.isdecimal() or int(number) < 1]:
        parser.error(f"--ranks: {wrong[0]!r} is not a number of processes, at least 1, as in 1,2,4")
    ranks = [int(number) for number in numbers]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(dir=".") as name:
        allowed = [PARTS[part](Path(name), ranks) for part in parts]
    return int(not all(allowed))


def _real(root: Path, ranks: Sequence[int]) -> bool:
    base = _base(root)
    adapted = {number: count_adaptation(root, base, number) for number in ranks}
    allowed = report("counted in real processes", COUNTED, adapted)
    evaluated = {number: count_evaluation(root, number) for number in ranks}
    return report("counted in evaluations", EVALUATED, evaluated) and allowed


def _zero(root: Path, ranks: Sequence[int]) -> bool:
    base = _base(root)
    return report("counted with DeepSpeed", ZERO, {number: count_zero(root, base, number) for number in ranks})


def _machines(root: Path, ranks: Sequence[int]) -> bool:
    found = {number: count_downloads(root, number) for number in ranks}
    return report("downloads of a machine in an epoch", MACHINES, found)


def _simulated(_root: Path, _ranks: Sequence[int]) -> bool:
    allowed = report("counted on simulated ranks", SIMULATION, {number: simulate(number) for number in SIMULATED})
    found = {number: gathered(number) for number in SIMULATED[1:]}
    return report("held by a rank while rank 0 gathers", GATHERED, found) and allowed


def _shares(root: Path, _ranks: Sequence[int]) -> bool:
    if not (root / "data").exists():
        _write_data(root / "data")
    allowed = report("shares of many ranks", SHARES, {number: shares(root, number) for number in SIMULATED})
    found = {number: shards_read(number) for number in SIMULATED}
    return report("shards that one machine reads in an epoch", DOWNLOADS, found) and allowed


PARTS = {"ranks": _real, "zero": _zero, "machines": _machines, "simulated": _simulated, "shares": _shares}


def _base(root: Path) -> Path:
    return root / "base" if (root / "base").exists() else write_base(root)


def report(title: str, rows: Sequence[Measurement], counts: Mapping[int, Mapping[str, float]]) -> bool:
    """Print and save a table with one column per number of ranks; returns whether every row is allowed."""
    table = Table(title=f"{title}: largest count of any rank, by number N", title_justify="left")
    allowed = True
    for heading in ("", *(str(ranks) for ranks in counts), "allowed", "found"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        by_ranks = {ranks: found[row.name] for ranks, found in counts.items()}
        unit = ", MiB" if row.unit == MIB else ""
        cells = (f"{count / row.unit:,.2f}" if unit else f"{count:,.0f}" for count in by_ranks.values())
        found = shape_of(row.compared(by_ranks), row.base) if max(by_ranks) >= row.fewest else ""
        table.add_row(row.name + unit, *cells, row.allowed, found + ("" if is_allowed(row, by_ranks) else " !"))
        allowed = allowed and is_allowed(row, by_ranks)
    Terminal(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    sys.stdout.flush()
    save(f"scale {title}", {"counts": {str(ranks): dict(found) for ranks, found in counts.items()}})
    return allowed


def count_adaptation(root: Path, base: Path, ranks: int) -> dict[str, float]:
    """Adapt the base on a number of ranks; returns the largest count of any rank."""
    return _count(root / f"ranks-{ranks}", ranks, *_adaptation(root, base, ranks, "fsdp2"))


def adapted_run(root: Path, ranks: int, engine: str = "fsdp2") -> Path:
    """Return the directory of the adaptation on a number of ranks, each of which has written a file of tensors."""
    return root / f"run-{engine}-{ranks}"


def count_zero(root: Path, base: Path, ranks: int) -> dict[str, float]:
    """Adapt the base with DeepSpeed, whose stage 3 divides parameters not by rows."""
    arguments = _adaptation(root, base, ranks, "deepspeed")
    return _count(root / f"deepspeed-{ranks}", ranks, *arguments, "deepspeed.stage=3", "train.validate_every=0")


def count_evaluation(root: Path, ranks: int) -> dict[str, float]:
    """Evaluate a model that this number of ranks has adapted; the ranks share its weights."""
    place = root / f"evaluation-{ranks}"
    keys = [f"out={place / 'result.json'}", f"shards={ranks}", "domain=text", "split=validation", "device=cpu"]
    sizes = [f"num={_VALIDATED}", f"nelbo_samples={_VALIDATED}", "nelbo_draws=1", "sampler.steps=4", "batch_size=8"]
    return _count(place, ranks, "evaluate", str(adapted_run(root, ranks)), *keys, *sizes)


def _adaptation(root: Path, base: Path, ranks: int, engine: str) -> list[str]:
    # One micro-batch on each rank: accumulation would repeat its collectives.
    batch = f"train.global_batch_size={_MICRO_BATCH * ranks}"
    run = adapted_run(root, ranks, engine)
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
    if not (root / "data").exists():
        _write_data(root / "data")
    (root / "empty.yaml").write_text("{}\n")
    model = [f"model.width={width}", f"model.layers={layers}", "model.heads=8", "train.validate_every=0"]
    _run(["-m", "scmdm", "train", str(root / "empty.yaml"), *_keys(root, root / "base"), *model])
    return root / "base"


def _write_data(place: Path, *, shard_bytes: int = 1 << 14) -> None:
    rows = np.random.default_rng(0).integers(4, 4 + len(_SYMBOLS), (_SAMPLES, _LENGTH)).tolist()
    description = Description("scale", _LENGTH, "loss", "loss", {})
    splits = {"train": rows, "validation": rows[:_VALIDATED]}
    write_dataset(place, CharacterTokenizer(_SYMBOLS), splits, description, shard_bytes=shard_bytes)


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


def simulate(ranks: int) -> dict[str, float]:
    """Count one adaptation step of rank 0 of `ranks`, with one sequence for each rank.

    The model is as wide as there are ranks at most: FSDP2 pads parameters of fewer rows to one row for each rank.
    """
    with fake_ranks(ranks):
        shape = replace(QM9, model=replace(QM9.model, width=1024, layers=4), batch=1, micro=1)
        engine, step = make_engine_step(shape, rate=1.0, engine="fsdp2", ranks=ranks)
        step()  # the first one also sets the engine up
        with Collectives() as counted:
            step()
        parameters = [local_part(value) for value in engine.parameters().values()]
        held = sum(value.nbytes for value in parameters)
        with LiveBytes(parameters) as live, following_resizes(live):
            step()
    return {
        SIMULATION[0].name: 4.0 * held,
        SIMULATION[1].name: counted.count,
        SIMULATION[2].name: counted.bytes,
        SIMULATION[3].name: 3.0 * held + live.peak,  # weights and moments beside what the step allocates
    }


def gathered(ranks: int) -> dict[str, float]:
    """Count what a rank other than 0 holds when rank 0 gathers numbers or reports of all ranks."""
    found = {}
    seconds = dict.fromkeys(PARTS_OF_A_STEP, 0.0)
    actions: tuple[Callable[[], object], ...] = (
        lambda: summarize_parts(seconds, 1),
        lambda: gather_object(("a-host", 0.0, [])),
    )
    with fake_ranks(ranks, rank=1):
        for row, action in zip(GATHERED, actions, strict=True):
            with Collectives() as counted:
                action()
            found[row.name] = float(counted.all_bytes)
    return found


def shares(root: Path, ranks: int) -> dict[str, float]:
    """Return what the functions that divide work give the rank with the most of it."""
    parts = [SealedPart("weights", *place, f"{place[0]:064x}") for place in chunk_ends(_BASE_BYTES, _CHUNK)]
    divided = balance(parts, ranks, ranks)
    hashed = max(sum(part.end - part.begin for part in share) for share in divided)
    sent = ranks * max(len(pickle.dumps(share)) for share in divided)  # a scatter pads them to the largest
    rows = ValidationRows(root / "data", Manifest.read(root / "data"), range(_SHARED), 0)
    drawn = max(len(share_of(range(_SHARED), rank, ranks)) for rank in range(ranks))
    validated = ValidationSet("validation", (rows,)).share(ranks)
    return dict(zip((row.name for row in SHARES), (hashed, validated, drawn, sent), strict=True))


def count_downloads(root: Path, machines: int) -> dict[str, float]:
    """Read an epoch of remote data on one machine after the other, each with a cache of its own."""
    remote = root / "remote"
    if not remote.exists():
        _write_data(remote, shard_bytes=1 << 10)
    shards, sizes = [], []
    for rank in range(machines):
        cache = root / f"cache-{machines}-{rank}"
        with _only_process(rank, machines):
            _read_epoch(open_data(DataConfig(path=str(cache), remote=str(remote))), machines)
        found = list((cache / "train").glob("*.mds"))
        shards.append(len(found))
        sizes.append(sum(path.stat().st_size for path in found))
    return {MACHINES[0].name: max(shards), MACHINES[1].name: max(sizes)}


@contextmanager
def _only_process(rank: int, machines: int) -> Iterator[None]:
    """Make this process the only one of a machine; streaming waits for no other."""
    own = {"RANK": rank, "WORLD_SIZE": machines, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update({name: str(value) for name, value in own.items()})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _read_epoch(data: DataMixture, machines: int) -> None:
    nodes = canonical_nodes(data, "train", machines)
    size = _EPOCH_BATCH // machines
    loader = build_loader(
        data,
        "train",
        batch_size=size,
        shuffle=True,
        seed=0,
        drop_last=True,
        num_canonical_nodes=nodes,
        shuffle_block=(1 << 18) // nodes,
    )
    steps = _SAMPLES // _EPOCH_BATCH
    assert sum(1 for _ in islice(epochs(loader, _EPOCH_BATCH, None), steps)) == steps


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
