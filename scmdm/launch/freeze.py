"""What a job runs is fixed when it is submitted: a copy of the code and of the resolved configuration.

A queued or requeued job must not change because somebody edits a file.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from data_prep import make_source
from scmdm.config.loading import load_config, to_yaml
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.data.preparation.shard_writer import check_place
from scmdm.errors import UserError
from scmdm.observability.environment import REVISION_FILE, git_revision
from scmdm.system.files import atomic_write_text

COMMANDS = ("train", "adapt")
_PACKAGES = ("scmdm", "data_prep")


@dataclass(frozen=True)
class Frozen:
    """One launch: RUN/launch/TIME, or OUT.launch/TIME beside the data set that is to be made, with `code/`,
    `config.yaml` and, later, `job.sbatch` and `logs/`."""

    command: str
    target: Path  # the run directory, or the data set
    directory: Path

    @property
    def code(self) -> Path:
        return self.directory / "code"

    @property
    def config(self) -> Path:
        return self.directory / "config.yaml"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def environment(self) -> dict[str, str]:
        """That makes Python take the copy: `-m` would look into the working directory first, often the checkout."""
        return {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}

    @property
    def arguments(self) -> list[str]:
        """Of `python -m scmdm`."""
        return [self.command, str(self.config)]


def resolve_preparation(config: Path, overrides: list[str], tasks: int) -> PrepareConfig:
    """The configuration of a preparation by so many tasks; UserError now for what would fail when they start."""
    resolved = load_config(PrepareConfig, config, [*overrides, f"slice=0/{tasks}"])
    check_place(Path(resolved.out))
    make_source(resolved).files()
    return dataclasses.replace(resolved, slice=None)


def resolve(command: str, config: Path, overrides: list[str], ranks: int) -> RunConfig:
    """The configuration that is to be launched; UserError now for what would otherwise fail when the job starts."""
    if command not in COMMANDS:
        raise UserError(f"command {command!r} is not possible; it must be one of {', '.join(COMMANDS)}")
    resolved = load_config(RunConfig, config, overrides)
    resolved.check_command(command)
    resolved.check_ranks(ranks)
    return resolved


def place(command: str, config: RunConfig | PrepareConfig) -> Frozen:
    """Where the launch will be; nothing is written."""
    if isinstance(config, PrepareConfig):
        target = Path(config.out).resolve()
        launches = target.with_name(f"{target.name}.launch")  # the data set appears under its name when it is complete
    else:
        target = Path(config.run_dir).resolve()
        launches = target / "launch"
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    taken = {path.name for path in launches.glob(f"{name}*")}
    free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)
    return Frozen(command, target, launches / free)


def freeze(frozen: Frozen, config: RunConfig | PrepareConfig) -> None:
    """Copy code and configuration into the launch's directory."""
    source = Path(__file__).resolve().parents[2]
    try:
        frozen.logs.mkdir(parents=True)
        for package in _PACKAGES:
            if (source / package).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source / package, frozen.code / package, ignore=ignore)
    except OSError as error:
        raise UserError(
            f"cannot write {frozen.directory}: {error.strerror or error}; free space or choose another run_dir"
        ) from error
    atomic_write_text(frozen.config, to_yaml(config))
    atomic_write_text(frozen.code / REVISION_FILE, json.dumps(git_revision(source / "scmdm")) + "\n")
