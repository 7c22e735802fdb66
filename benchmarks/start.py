"""CPU time from the start of `scmdm train` to the end of its first step, by part, compared with `import torch`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.step import QM9
from benchmarks.timing import show_figures
from scmdm.data.preparation.shard_writer import Description, write_dataset
from scmdm.data.tokenizers import CharacterTokenizer

_ROUNDS, _SAMPLES = 3, 10_000


def main() -> None:
    """Print medians of the parts, with the model and batch of the quickstart."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        root = Path(name)
        _write(root / "data")
        (root / "run.yaml").write_text("{}\n")
        rounds = [first_step(root, root / f"run{number}") for number in range(_ROUNDS)]
    parts = {part: [found[part] for found in rounds] for part in rounds[0]}
    figures = {
        part: f"{statistics.median(seconds):6.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]"
        for part, seconds in parts.items()
    }
    show_figures("start: CPU seconds to the first step (QM9's model and batch)", figures, parts)


def first_step(root: Path, run_dir: Path) -> dict[str, float]:
    """Measure the CPU seconds of each part and in total, in a new process."""
    batch = QM9.batch
    keys = ["train.steps=1", "train.validate_every=0", f"train.global_batch_size={batch}"]
    keys += [f"train.micro_batch_size={batch}", f"data.path={root / 'data'}", f"run_dir={run_dir}"]
    command = [sys.executable, "-m", "benchmarks.first_step", str(root / "run.yaml"), *keys]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ends: dict[str, float] = json.loads(output.splitlines()[-1])
    parts = {name: end - begin for (_, begin), (name, end) in pairwise([("", 0.0), *ends.items()])}
    return {**parts, "all": max(ends.values())}


def _write(root: Path) -> None:
    tokenizer = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz0123")
    ids_NL = np.random.default_rng(0).integers(4, QM9.vocab, (_SAMPLES, QM9.length))
    splits = {"train": ids_NL.tolist(), "validation": ids_NL[:256].tolist()}
    write_dataset(root, tokenizer, splits, Description("start", QM9.length, "loss", "loss", {}), shard_bytes=64 << 20)
