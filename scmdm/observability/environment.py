"""Describe the environment of a run: package versions, machine, git revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from scmdm.observability.git_revision import git_revision

PACKAGES = (
    "scmdm",
    "torch",
    "mosaicml-streaming",
    "numpy",
    "omegaconf",
    "safetensors",
    "sentencepiece",
    "rdkit",
    "fcd",
)


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_environment() -> dict[str, Any]:
    """JSON-able description, stored as `environment.json` in every run directory."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git": git_revision(Path(__file__).parent),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cpu": {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
