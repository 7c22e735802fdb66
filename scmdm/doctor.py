"""`scmdm doctor`: examine what this machine can run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from scmdm.distributed.engine import cpp_compiler, resolve_device, resolve_precision
from scmdm.errors import UserError
from scmdm.models.attention import flash_unusable_because
from scmdm.observability.environment import installed_version

OPTIONAL = {
    "flash-attn": "faster attention on GPUs",
    "deepspeed": "ZeRO sharding",
    "wandb": "experiment tracking",
    "transformers": "generative perplexity under a scorer",
    "fcd": "Frechet ChemNet distance",
    "qm9pack": "the QM9 molecules",
}


@dataclass(frozen=True)
class Finding:
    """One line of `scmdm doctor`; `level` is "ok", "note" or "problem"."""

    level: str
    subject: str
    text: str


def print_findings(directory: Path) -> None:
    """Print the findings; raises UserError when one of them is a problem."""
    findings, console = examine(directory), Console()
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        console.print(f"[{colours[finding.level]}]{finding.level:<8}[/] {finding.subject:<16}", end="")
        console.print(finding.text, markup=False, highlight=False)
    problems = [finding.subject for finding in findings if finding.level == "problem"]
    if problems:
        raise UserError(f"problems with {', '.join(problems)}: see above")


def examine(directory: Path) -> list[Finding]:
    """What this machine can run; disk space is that of `directory`."""
    return [*_examine_compute(), *_examine_packages(), *_examine_disk(directory)]


def _examine_compute() -> Iterator[Finding]:
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    yield Finding("ok", "python", f"{platform.python_version()}, torch {torch.__version__}")
    yield Finding("ok", "cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if device.type == "cpu":
        yield Finding("note", "gpu", "none: training runs on the CPU; the quickstart is made for that")
    yield Finding("ok", "precision", f"precision=auto means {str(dtype).removeprefix('torch.')} on {device.type}")
    reason = flash_unusable_because(device.type, dtype)
    yield Finding("ok", "attention", "flash-attn" if reason is None else f"torch's own kernels ({reason})")
    if device.type == "cpu":
        found = cpp_compiler()
        text = f"model.compile=true would use {found}" if found else "no C++ compiler for model.compile=true"
        yield Finding("ok" if found else "note", "compile", text)


def _examine_packages() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        version = installed_version(name)
        yield Finding("ok", name, version) if version else Finding("note", name, f"not installed ({purpose})")


def _examine_disk(directory: Path) -> Iterator[Finding]:
    there = next(path for path in (directory.resolve(), *directory.resolve().parents) if path.exists())
    for subject, path, least in (("disk", there, 2.0), ("shared memory", Path("/dev/shm"), 0.25)):
        if not path.exists():
            continue
        free = shutil.disk_usage(path).free / 2**30
        level = "ok" if free >= least else "problem"
        yield Finding(level, subject, f"{free:.1f} GiB free" + ("" if level == "ok" else f"; {least} GiB is the least"))
