"""`scmdm moses`: MOSES' table of the molecules in a file, whoever made them, or of MOSES' own sets."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.moses import Moses, read_smiles
from scmdm.config.moses import MosesConfig
from scmdm.errors import UserError
from scmdm.evaluation.moses import MosesReference, evaluate_moses
from scmdm.files import atomic_write_text, require_writable
from scmdm.parallel.engine import resolve_device
from scmdm.workers import worker_count

# The whole training set; data/samples/train_metrics.csv of molecularsets/moses, and the table of its README.
PUBLISHED = {
    "valid": 1.0,
    "unique@1000": 1.0,
    "unique@10000": 1.0,
    "FCD/Test": 0.0080,
    "SNN/Test": 0.6419,
    "Frag/Test": 0.99998,
    "Scaf/Test": 0.9907,
    "FCD/TestSF": 0.4755,
    "SNN/TestSF": 0.5859,
    "Frag/TestSF": 0.9986,
    "Scaf/TestSF": 0.0,
    "IntDiv": 0.8567,
    "IntDiv2": 0.8508,
    "Filters": 1.0,
}


def run_moses(samples: str, config: MosesConfig) -> dict[str, Any]:
    """Measure a file with one SMILES on each line, or the published split of that name; print the table, write it where
    `config` says, and return what was written."""
    if config.out is not None:
        require_writable(Path(config.out))
    smiles = read_smiles(samples) if samples in Moses.published else _read_lines(Path(samples))
    device = str(resolve_device(config.device))
    workers = config.workers or worker_count()
    started = time.perf_counter()
    reference = MosesReference.published(fcd=config.fcd, workers=workers)
    found = evaluate_moses(
        smiles,
        [True] * len(smiles),
        reference,
        workers=workers,
        device=device,
        means_of=config.means_of,
        title=f"{len(smiles):,} molecules",
    ).as_dict()
    result = {"samples": samples, "config": asdict(config), "seconds": time.perf_counter() - started, "moses": found}
    _print(result, PUBLISHED if samples == "train" else {})
    if config.out is not None:
        atomic_write_text(Path(config.out), json.dumps(result, indent=2) + "\n")
    return result


def _read_lines(path: Path) -> list[str]:
    """What stands before white space on each line, behind a header `SMILES` where there is one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        splits = ", ".join(Moses.published)
        raise UserError(
            f"{path} cannot be read ({error}); give a text file with one SMILES on each line, or one of {splits}"
        ) from error
    smiles = [line.split(maxsplit=1)[0] if line.strip() else "" for line in lines]
    smiles = smiles[1:] if smiles and smiles[0].upper() == "SMILES" else smiles
    if not smiles:
        raise UserError(f"{path} is empty; give a text file with one SMILES on each line")
    return smiles


def _print(result: dict[str, Any], published: dict[str, float]) -> None:
    table = Table(title=f"MOSES' metrics of {result['samples']}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    if published:
        table.add_column("published", justify="right")
    for name, value in result["moses"].items():
        shown = f"{value:,}" if isinstance(value, int) else "-" if value is None else f"{value:.4f}"
        table.add_row(name, shown, *([f"{published[name]:.4f}" if name in published else ""] if published else []))
    Console().print(table)
    Console().print(f"{result['seconds']:,.0f} s", highlight=False)
