"""Which state of the source this is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, cast

REVISION_FILE = "revision.json"  # beside a copy of the package: the revision that it was copied from


def git_revision(package: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds `package` (or that it is a copy from) and whether it has changes.

    None outside a checkout.
    """
    kept = package.parent / REVISION_FILE
    if kept.is_file():
        return cast(dict[str, Any] | None, json.loads(kept.read_text()))

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "changed": bool(git("status", "--porcelain"))}
