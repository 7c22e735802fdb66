"""`scmdm doctor`: report what this machine can run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from scmdm.distributed.engine import resolve_device, resolve_precision
from scmdm.errors import UserError
from scmdm.models.attention import flash_unusable_because
from scmdm.models.compilation import cpp_compiler
from scmdm.system.extras import EXTRAS, PURPOSES, installed_version, missing_packages
from scmdm.system.terminal import Terminal

_BASE_PACKAGES = ("mosaicml-streaming", "deepspeed", "wandb", "transformers")
_MIN_FREE_DISK, _MIN_FREE_SHARED_MEMORY = 2.0, 0.25  # GiB


@dataclass(frozen=True)
class Finding:
    """One line of `scmdm doctor`; `level` is "ok", "note" or "problem"."""

    level: str
    subject: str
    text: str


def print_findings(directory: Path) -> None:
    """Print all findings. Raises UserError if one of them is a problem."""
    findings, console = examine(directory), Terminal()
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        console.print(f"{finding.level:<8}", style=colours[finding.level], end=" ")
        console.print(f"{finding.subject:<20}{finding.text}")
    problems = [finding.subject for finding in findings if finding.level == "problem"]
    if problems:
        raise UserError(f"problems with {', '.join(problems)}: see above")


def examine(directory: Path) -> list[Finding]:
    """Examine devices, packages and free disk space at `directory`."""
    return [*_examine_compute(), *_examine_packages(), *_examine_extras(), *_examine_disk(directory)]


def _examine_compute() -> Iterator[Finding]:
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    yield Finding("ok", "python", f"{platform.python_version()}, torch {torch.__version__}")
    yield Finding("ok", "cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if device.type == "cpu":
        yield Finding("note", "gpu", "none: training runs on the CPU, which suffices for the quickstart")
    yield Finding("ok", "precision", f"precision=auto means {str(dtype).removeprefix('torch.')} on {device.type}")
    reason = flash_unusable_because(device.type, dtype)
    yield Finding("ok", "attention", "flash-attn" if reason is None else f"torch's kernels ({reason})")
    if device.type == "cpu":
        found = cpp_compiler()
        text = f"model.compile uses {found}" if found else "no C++ compiler: model.compile=none is the only choice"
        yield Finding("ok" if found else "note", "compile", text)


def _examine_packages() -> Iterator[Finding]:
    for name in _BASE_PACKAGES:
        version = installed_version(name)
        if version:
            yield Finding("ok", name, version)
        else:
            yield Finding("problem", name, "not installed; `pip install scmdm` installs it")


def _examine_extras() -> Iterator[Finding]:
    for extra in EXTRAS:
        missing = missing_packages(extra)
        subject = f"extra {extra}"
        if not missing:
            yield Finding("ok", subject, f"installed ({PURPOSES[extra]})")
        else:
            remedy = f"`pip install 'scmdm[{extra}]'`"
            yield Finding("note", subject, f"missing {', '.join(missing)}; {remedy} ({PURPOSES[extra]})")


def _examine_disk(directory: Path) -> Iterator[Finding]:
    place = Path(os.path.realpath(directory))
    existing = next(path for path in (place, *place.parents) if os.path.exists(path))
    for subject, path, required in (
        ("disk", existing, _MIN_FREE_DISK),
        ("shared memory", Path("/dev/shm"), _MIN_FREE_SHARED_MEMORY),
    ):
        if not path.exists():
            continue
        free = shutil.disk_usage(path).free / 2**30
        level, shortage = ("ok", "") if free >= required else ("problem", f"; at least {required} GiB are needed")
        yield Finding(level, subject, f"{free:.1f} GiB free{shortage}")
