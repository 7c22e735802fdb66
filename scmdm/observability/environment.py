"""Environment of a run: package versions, machine, git revision of the source."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import torch

from scmdm.system.extras import installed_version
from scmdm.system.untrusted import read_json

REVISION_FILE = "revision.json"  # beside a copy of the package: the git revision it was copied from
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


def describe_environment() -> dict[str, Any]:
    """Describe this process's environment in JSON types, for `environment.json` in the run directory."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git": git_revision(Path(__file__).parents[1]),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cpu": {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_revision(package: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout of `package` or of its original, and whether it had changes, or None."""
    kept = package.parent / REVISION_FILE
    if kept.is_file():
        return cast(dict[str, Any] | None, read_json(kept, "git revision"))

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(git("status", "--porcelain"))}
