"""The commands `scmdm checkpoint list` and `scmdm checkpoint verify`."""

from __future__ import annotations

from pathlib import Path

from scmdm.checkpoint.reader import checkpoints_of, list_checkpoints, require_existing
from scmdm.checkpoint.seal import verify_checkpoint
from scmdm.errors import UserError
from scmdm.system.terminal import say


def list_all(run_directory: Path) -> None:
    """Print the checkpoints of a run, each with its problems or `ok`."""
    require_existing(run_directory)
    found = list_checkpoints(checkpoints_of(run_directory))
    if not found:
        raise UserError(f"{run_directory} has no checkpoints; give the directory of a run that has saved one")
    for path in found:
        say(f"{path.name} {'; '.join(verify_checkpoint(path)) or 'ok'}")


def verify(model: Path) -> None:
    """Check a checkpoint, an export, or all checkpoints of a run. Raises UserError, which lists the problems."""
    require_existing(model)
    found = list_checkpoints(checkpoints_of(model)) or [model]
    problems = [problem for path in found for problem in verify_checkpoint(path)]
    if problems:
        raise UserError(f"{'; '.join(problems)}: restore the directory or use another checkpoint")
    for path in found:
        say(f"{path} has no problems")
