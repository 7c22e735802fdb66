"""The data loader compared with a training step and with Hugging Face `datasets`; start and memory on a large data set.

`python -m benchmarks.loader DATA_SET` prints the time of a process to its first batch, and its memory.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from torch import Tensor

from benchmarks.step import QM9, make_engine_step
from benchmarks.timing import CLOCK, interleave, ratios, show, show_figures
from scmdm.config.data import DataConfig
from scmdm.data.loader import build_loader, epochs
from scmdm.data.mixture import open_data
from scmdm.data.preparation.framing import FramedSequence
from scmdm.data.preparation.shard_writer import Description, join_pieces, write_piece
from scmdm.data.tokenizers import CharacterTokenizer

_SYMBOLS = "abcdefghijklmnopqrstuvwxyz0123"  # 34 ids with the specials, as QM9
_TIMED = 20  # batches per timed round
_LARGE_LENGTH, _LARGE_BATCH = 16, 1024
_SHARD, _SHARDS = 100_000, 100  # samples per shard, and links to the shard: 10 million samples
_READ = 100  # batches over which memory is measured


def main() -> None:
    """Print the speeds of loader, training step and baseline, then start and memory on ten million samples."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        root = Path(name)
        ids_NL = np.random.default_rng(0).integers(4, 4 + len(_SYMBOLS), (_SHARD, QM9.length), np.uint16)
        write(root, "small", ids_NL, 1)
        _speed(root, ids_NL)
        write(root, "large", ids_NL[:, :_LARGE_LENGTH], _SHARDS)
        _start(root / "large")


def write(root: Path, name: str, ids_NL: np.ndarray, shards: int) -> None:
    """Write a data set of one shard, linked under `shards` names."""
    tokenizer, piece = CharacterTokenizer(_SYMBOLS), root / f"{name}-piece"
    description = Description("benchmark", ids_NL.shape[1], "loss", "loss", {})
    piece.mkdir()
    write_piece(piece, (("train", FramedSequence(row)) for row in ids_NL), tokenizer, description, 64 << 20)
    join_pieces(root / name, [piece] * shards, ["train"], tokenizer, description)


def read_batches(root: Path, batch_size: int) -> Iterator[dict[str, Tensor]]:
    data = open_data(DataConfig(path=str(root)))
    return epochs(build_loader(data, "train", batch_size=batch_size, shuffle=True, seed=0, drop_last=True), batch_size)


def _speed(root: Path, ids_NL: np.ndarray) -> None:
    from benchmarks.baselines import corpus  # imports `datasets`, which only this comparison needs

    corpus.save(ids_NL, root / "arrow")
    ours, theirs = f"{_TIMED} batches", f"{_TIMED} batches of datasets"
    timings = interleave(
        {
            ours: functools.partial(_take, read_batches(root / "small", QM9.batch)),
            theirs: functools.partial(_take, corpus.batches(root / "arrow", QM9.batch)),
            "one training step": make_engine_step(QM9, rate=0.0)[1],
        }
    )
    show(f"loader (batches of {QM9.batch} x {QM9.length})", timings, ours)
    multiple = [_TIMED * x for x in ratios(timings, ours)["one training step"]]
    text = f"{statistics.median(multiple):.0f} [{min(multiple):.0f}, {max(multiple):.0f}] [{CLOCK} time]"
    show_figures("loader against one training step", {"batches in the time of a step": text}, {"multiple": multiple})


def _take(source: Iterator[object]) -> None:
    for _ in itertools.islice(source, _TIMED):
        pass


def _start(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.loader", str(root)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    figures = {name: f"{wall:.2f} s, {cpu:.2f} s of CPU time" for name, (wall, cpu) in found["seconds"].items()}
    memory = ", ".join(f"{mib:.0f} MiB after {count}" for count, mib in found["resident"].items())
    title = f"loader: first batch of {_SHARD * _SHARDS:,} samples, and memory by batches"
    show_figures(title, {**figures, "resident": memory}, found)


def read(root: Path) -> dict[str, Any]:
    """Return wall and CPU seconds of this process to its first batch, and its memory by number of batches."""
    process = psutil.Process(os.getpid())
    seconds = {"imports": _seconds(process)}
    batches = read_batches(root, _LARGE_BATCH)
    next(batches)
    seconds["first batch, from the start of the process"] = _seconds(process)
    resident = {1: process.memory_info().rss / 2**20}
    for count, _ in enumerate(itertools.islice(batches, _READ - 1), start=2):
        if count in (_READ // 4, _READ):
            resident[count] = process.memory_info().rss / 2**20
    return {"seconds": seconds, "resident": resident}


def _seconds(process: psutil.Process) -> tuple[float, float]:
    return time.time() - process.create_time(), time.process_time()


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))
