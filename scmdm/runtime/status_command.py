"""`scmdm status`."""

from __future__ import annotations

import dataclasses
from json import dumps
from pathlib import Path

from scmdm.runtime.status import describe_status, read_status
from scmdm.system.terminal import say


def print_status(directory: Path, *, quick: bool, json: bool) -> None:
    """Print the status of a run; `quick` checks only the sizes of checkpoint files."""
    status = read_status(directory, hashes=not quick)
    say(dumps(dataclasses.asdict(status), indent=2) if json else "\n".join(describe_status(status)))
