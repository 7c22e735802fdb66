"""Preparation of text into packed blocks: `scmdm prepare` with one and two workers, compared with `datasets.map`."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers

from benchmarks.timing import Timing, interleave, ratios, show
from scmdm.config.loading import load_config
from scmdm.config.preparation import PrepareConfig
from scmdm.data.preparation.prepare import prepare

_MIB, _LENGTH, _VOCAB = 16, 256, 8192
_WORDS, _LINE = 30_000, 100  # distinct words, and words per line
_ROUNDS = 3
_COPIES, _COPIES_ROUNDS = 16, 2  # copies of the text for two workers, so that imports do not dominate


def main() -> None:
    """Print CPU seconds, which other load hardly changes, and ratios."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # compare single cores
    with tempfile.TemporaryDirectory(dir=".") as name:
        root = Path(name)
        text = write_text(root / "text.txt", _MIB << 20)
        tokenizer = train_tokenizer(text, root / "tokenizer.json")
        _against_datasets(root, text, tokenizer)
        large = root / "large.txt"
        large.write_bytes(_COPIES * text.read_bytes())
        _two_workers(root, large, tokenizer)


def write_text(path: Path, size: int) -> Path:
    """Write lines of random words, the k-th with probability proportional to 1 / k (Zipf)."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 11, _WORDS)])
    weights = 1 / np.arange(1, _WORDS + 1)
    with open(path, "w") as file:
        while file.tell() < size:
            drawn = words[rng.choice(_WORDS, (100, _LINE), p=weights / weights.sum())]
            file.writelines(" ".join(line) + ".\n" for line in drawn)
    return path


def train_tokenizer(text: Path, path: Path) -> Path:
    """Train a byte-level BPE tokenizer, as GPT-2's, and write its `tokenizer.json`."""
    pipeline = tokenizers.ByteLevelBPETokenizer()
    pipeline.train([str(text)], vocab_size=_VOCAB, special_tokens=["<|endoftext|>"], show_progress=False)
    pipeline.save(str(path))
    return path


def options(text: Path, tokenizer: Path, out: Path, workers: int, length: int = _LENGTH) -> dict[str, object]:
    """Keys of `scmdm prepare` for the work that the baseline does."""
    return {
        "out": str(out),
        "source.name": "text",
        "source.path": str(text),
        "source.unit": "lines",
        "tokenizer.name": "huggingface",
        "tokenizer.path": str(tokenizer),
        "length": length,
        "framing": "concatenate",
        "bos_policy": "loss",
        "held_out_last": 10,
        "deduplicate": False,
        "part_mb": 2,
        "workers": workers,
    }


def _against_datasets(root: Path, text: Path, tokenizer: Path) -> None:
    from benchmarks.baselines import corpus  # imports `datasets`, which only this comparison needs

    def ours() -> None:
        shutil.rmtree(root / "ours", ignore_errors=True)
        keys = [f"{key}={value}" for key, value in options(text, tokenizer, root / "ours", 1).items()]
        config = load_config(PrepareConfig, None, keys)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            prepare(config)

    def theirs() -> None:
        shutil.rmtree(root / "theirs", ignore_errors=True)
        corpus.tokenize(text, tokenizer, root / "theirs", _LENGTH)

    functions: dict[str, Callable[[], object]] = {"scmdm prepare, one process": ours, "datasets.map": theirs}
    title = f"preparation ({_MIB} MiB of text, byte-level BPE of {_VOCAB})"
    show(title, interleave(functions, warmup=0, rounds=_ROUNDS), "scmdm prepare, one process", clock="cpu")


def _two_workers(root: Path, text: Path, tokenizer: Path) -> None:
    """Time whole commands, with the imports of all processes; linear scaling would halve the wall time."""
    size = text.stat().st_size >> 20
    empty = root / "empty.yaml"
    empty.write_text("{}\n")
    timings = {f"workers={workers}": Timing([], []) for workers in (1, 2)}
    for _ in range(_COPIES_ROUNDS):
        for workers, timing in zip((1, 2), timings.values(), strict=True):
            shutil.rmtree(root / "ours", ignore_errors=True)
            keys = [f"{key}={value}" for key, value in options(text, tokenizer, root / "ours", workers).items()]
            wall, cpu = run([sys.executable, "-m", "scmdm", "prepare", str(empty), *keys])
            timing.wall.append(wall)
            timing.cpu.append(cpu)
    for clock in ("cpu", "wall"):
        show(f"preparation by workers, {clock} ({size} MiB of text)", timings, "workers=1", clock=clock)
    linear = [1 / x for x in ratios(timings, "workers=1", "cpu")["workers=2"]]
    print(f"  fraction of linear scaling on idle cores: {np.median(linear):.2f} [{min(linear):.2f}, {max(linear):.2f}]")


def run(command: list[str]) -> tuple[float, float]:
    """Measure wall and CPU seconds of a command with its child processes."""
    started, used = time.perf_counter(), _cpu_seconds()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started, _cpu_seconds() - used


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
