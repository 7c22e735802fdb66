"""`scmdm moses`: the metrics of MOSES for a file of molecules or a published set."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from data_prep.corpus_files import require_kind
from data_prep.moses import PUBLISHED_SPLITS, read_smiles
from data_prep.tables import read_header, read_rows
from data_prep.text_files import EMPTY, TextFile, decode
from scmdm.distributed.engine import resolve_device
from scmdm.domains.frechet import frechet_distance
from scmdm.domains.molecules.config import MosesConfig
from scmdm.domains.molecules.moses_metrics import TRAINING_SET, MosesReference, cache_folder, evaluate_moses
from scmdm.domains.molecules.set_statistics import ComputeOptions, SetStatistics, describe
from scmdm.errors import UserError
from scmdm.observability.run_metrics import format_duration
from scmdm.system.files import atomic_write_text, json_text, require_output_file
from scmdm.system.terminal import Terminal
from scmdm.system.untrusted import parse_as, parse_json_row, reading, require_regular
from scmdm.system.worker_processes import core_count


def run_moses(source: str, config: MosesConfig) -> dict[str, Any]:
    """Compute, print and write the metrics of `source`, the name of a published set or a file; returns them."""
    started = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.out is not None:
        require_output_file(Path(config.out))
    device = resolve_device(config.device).type
    compute = ComputeOptions(core_count(), device, progress=True)
    published = source in PUBLISHED_SPLITS
    if published:
        smiles, size = _published(source, config.num)
        framed, compute = [True] * len(smiles), replace(compute, cache=cache_folder())
    else:
        smiles, framed, size = _read(Path(source), config.num)
    reference = MosesReference.published(fcd=config.fcd, compute=compute)
    found = evaluate_moses(smiles, framed, reference, compute, detailed=config.detailed)
    result: dict[str, Any] = {"source": source, "of": size, "config": asdict(config), "metrics": found.metrics}
    if published and len(smiles) < size:
        result["whole"] = _extrapolate(found.smiles, size, config, reference, compute)
    result["seconds"] = time.perf_counter() - started
    if config.out is not None:
        atomic_write_text(Path(config.out), json_text(result, indent=2))
    _print(result)
    if config.out is not None:
        Terminal().print(f"wrote {config.out}", soft_wrap=True)
    return result


def _published(split: str, num: int | None) -> tuple[list[str], int]:
    """Return the first `num` molecules of a fixed random order, and the size of the set."""
    smiles = read_smiles(split)
    _require_num(num, f"the set {split}", len(smiles))
    order = np.random.default_rng(0).permutation(len(smiles))[:num]
    return [smiles[index] for index in order], len(smiles)


def _require_num(num: int | None, where: str, count: int) -> None:
    if num is not None and num > count:
        raise UserError(f"num={num} is not possible; {where} has {count} molecules")


def _read(path: Path, num: int | None) -> tuple[list[str], list[bool], int]:
    """Read SMILES, whether each is framed (known for `.jsonl` only), and the number of molecules in the file.

    Raises UserError for a line that cannot be read: the metrics are shares of all lines. A blank line of a file of
    lines is a molecule that is not valid; `.jsonl` and tables may have blank lines, which are none.
    """
    with reading(path, "file of SMILES", f"give one, or one of {', '.join(PUBLISHED_SPLITS)}"):
        require_regular(path)
    file = TextFile(path)
    found = list(_READERS[require_kind(path, tuple(_READERS)).format or ""](file))
    if file.problem is not None and file.problem.reason != EMPTY:
        raise UserError(f"{file.problem.where}: {file.problem.reason}; give a file of SMILES")
    if not found:
        raise UserError(f"{path} contains no molecule; give a file with one SMILES per line")
    _require_num(num, str(path), len(found))
    return [text for text, _ in found[:num]], [ok for _, ok in found[:num]], len(found)


@dataclass(frozen=True)
class _Sample:
    """Row of a file that `scmdm sample out=NAME.jsonl` writes; it has other keys, too."""

    text: str
    framed: bool = True


def _of_rows(file: TextFile) -> Iterator[tuple[str, bool]]:
    for at, line in _decoded(file):
        if not line.strip():
            continue
        with reading(file.where(at), "row that `scmdm sample out=NAME.jsonl` writes"):
            row = parse_json_row(line)
            known = {name: row[name] for name in ("text", "framed") if name in row}
            sample = parse_as(_Sample, known, file.where(at))
        yield sample.text, sample.framed


def _of_table(file: TextFile) -> Iterator[tuple[str, bool]]:
    """The column SMILES, or the first one of a table without a header."""
    header = read_header(file, [_COLUMN])
    if header is None:
        return
    position = header.position(_COLUMN)
    if position is None:
        yield header.columns[0], True
    for row in read_rows(file, header):
        fields = row.fields[position or 0 :]
        if row.problem or not fields:
            raise UserError(f"{file.where(row.at)}: {row.problem or 'no such column in the row'}; correct it")
        yield fields[0].strip(), True


def _of_lines(file: TextFile) -> Iterator[tuple[str, bool]]:
    for number, (_, line) in enumerate(_decoded(file)):
        smiles = (line.replace(",", " ").split(maxsplit=1) or [""])[0]
        if (number, smiles) != (0, _COLUMN):
            yield smiles, True


def _decoded(file: TextFile) -> Iterator[tuple[int, str]]:
    for at, line in file.lines():
        text, problem = decode(line)
        if text is None:
            raise UserError(f"{file.where(at)}: {problem}; correct it")
        yield at, text


_COLUMN = "SMILES"
_READERS: Mapping[str, Callable[[TextFile], Iterator[tuple[str, bool]]]] = {
    "smi": _of_lines,
    "text": _of_lines,
    "jsonl": _of_rows,
    "csv": _of_table,
    "tsv": _of_table,
}


def _extrapolate(
    smiles: list[str], size: int, config: MosesConfig, reference: MosesReference, compute: ComputeOptions
) -> dict[str, float]:
    """Extrapolate the metrics that depend on the set's size (FCD, Frag, Scaf) from a random part to the whole set."""
    part = describe(smiles, compute, fcd=config.fcd, detailed=config.detailed)
    half = describe(smiles[: len(smiles) // 2], compute, fcd=config.fcd, detailed=config.detailed)
    found: dict[str, float] = {}
    for suffix, other in (("Test", reference.test), ("TestSF", reference.test_scaffolds)):
        if other is None:
            continue
        if (distance := _whole_distance(part, half, other, size)) is not None:
            found[f"FCD/{suffix}"] = distance
        for name, counts in (("Frag", "fragments"), ("Scaf", "scaffolds")):
            ours, theirs = getattr(part, counts), getattr(other, counts)
            found[f"{name}/{suffix}"] = whole_cosine(ours, theirs, size / len(smiles))
    return found


def _whole_distance(part: SetStatistics, half: SetStatistics, other: SetStatistics, size: int) -> float | None:
    """Extrapolate the FCD, whose bias is proportional to 1 / number of molecules (Chong and Forsyth, CVPR 2020)."""
    if part.activations is None or half.activations is None or other.activations is None:
        return None
    (x, a), (y, b) = (
        (1 / moments.count, frechet_distance(moments, other.activations))
        for moments in (part.activations, half.activations)
    )
    return a + (b - a) / (y - x) * (1 / size - x)


def whole_cosine(part: Mapping[str, int], other: Mapping[str, int], factor: float) -> float:
    """Estimate the cosine similarity to `other` of the counts of a whole set from those of a random part of it.

    `factor` is the size of the set divided by the size of the part. For frequencies p, the product of the part's counts
    is an unbiased estimate of p.q, but the squared norm of its frequencies exceeds p.p by (1 - p.p) / count.
    """
    counts, others = Counter(part), Counter(other)
    if counts.total() < 2 or not others.total():
        return math.nan
    product = sum(count * others[name] for name, count in counts.items()) / counts.total()
    pairs = sum(count * (count - 1) for count in counts.values()) / counts.total() / (counts.total() - 1)
    norm = math.sqrt(pairs + (1 - pairs) / (counts.total() * factor))
    return product / norm / math.sqrt(sum(count * count for count in others.values()))


def _print(result: dict[str, Any]) -> None:
    metrics, whole = result["metrics"], result.get("whole", {})
    num, size = metrics["num_samples"], result["of"]
    table = Table(title=f"MOSES: {result['source']}, {num:,} of {size:,} molecules")
    table.add_column("metric")
    for name in ("value", *(["estimate for all"] if whole else []), "training set (published)"):
        table.add_column(name, justify="right")
    for name, value in metrics.items():
        if name.startswith("num_") or value is None:
            continue
        estimate = [_number(whole.get(name))] if whole else []
        table.add_row(name, _number(value), *estimate, _number(TRAINING_SET.get(name)))
    count = result["config"]["detailed"]
    note = f"; SNN, IntDiv, Filters and properties of the first {count:,}" if count is not None and count < num else ""
    table.caption = f"{format_duration(result['seconds'])}{note}"
    Terminal().print(table)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.5f}"
