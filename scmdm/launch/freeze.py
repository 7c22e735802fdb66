"""Freeze code and configuration when a job is submitted.

A job runs the copies made here, so that editing a file does not change a queued or requeued job.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from scmdm.config.loading import load_config, replace_sections, to_yaml
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.config.shipped import is_shipped
from scmdm.data.preparation.shard_writer import check_place
from scmdm.data.preparation.source import make_source
from scmdm.errors import UserError
from scmdm.observability.environment import REVISION_FILE, git_revision
from scmdm.system.files import atomic_write_text
from scmdm.system.run_directory import LAUNCH

COMMANDS = ("train", "adapt")
_PACKAGES = ("scmdm", "data_prep")
_LEFT_OUT = ("configs",)  # a wheel has the shipped configurations in the package


@dataclass(frozen=True)
class FrozenLaunch:
    """Directory of one launch: `RUN/launch/TIME`, or for a preparation `OUT.launch/TIME`.

    It contains `code/`, `config.yaml`, `logs/` and, on SLURM, `job.sbatch`.
    """

    command: str
    target: Path  # run directory or data set
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
        """Variables that make Python import the copy. Without PYTHONSAFEPATH `-m` prefers the working directory."""
        return {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}

    @property
    def arguments(self) -> list[str]:
        """Arguments of `python -m scmdm`."""
        return [self.command, str(self.config)]


def resolve_preparation(config: Path, overrides: list[str], tasks: int) -> PrepareConfig:
    """Load and check the configuration of a preparation by `tasks` tasks. Raises UserError for mistakes in it."""
    resolved = load_config(PrepareConfig, config, [*overrides, f"slice=0/{tasks}"])
    check_place(Path(resolved.out))
    make_source(resolved).files()
    return dataclasses.replace(resolved, slice=None)


def resolve(command: str, config: Path, overrides: list[str], ranks: int) -> RunConfig:
    """Load and check the configuration of `command` on `ranks` ranks. Raises UserError for mistakes in it."""
    if command not in COMMANDS:
        raise UserError(f"command {command!r} is not possible; it must be one of {', '.join(COMMANDS)}")
    resolved = load_config(RunConfig, config, overrides)
    resolved.check_command(command)
    resolved.check_ranks(ranks)
    return resolved


def plan_launch(command: str, config: RunConfig | PrepareConfig) -> FrozenLaunch:
    """Choose a new launch directory. Nothing is written."""
    if isinstance(config, PrepareConfig):
        target = Path(os.path.realpath(config.out))
        launches = target.with_name(f"{target.name}.launch")  # the data set itself appears only when it is complete
    else:
        target = Path(os.path.realpath(config.run_dir))
        launches = target / LAUNCH
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    taken = {path.name for path in launches.glob(f"{name}*")}
    free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)
    return FrozenLaunch(command, target, launches / free)


def freeze(frozen: FrozenLaunch, config: RunConfig | PrepareConfig) -> None:
    """Copy code and configuration into the launch directory."""
    source = Path(__file__).resolve().parents[2]
    try:
        frozen.logs.mkdir(parents=True)
        for package in _PACKAGES:
            if (source / package).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", *_LEFT_OUT)
                shutil.copytree(source / package, frozen.code / package, ignore=ignore)
    except OSError as error:
        raise UserError(
            f"cannot write {frozen.directory}: {error.strerror or error}; free space or choose another run_dir"
        ) from error
    atomic_write_text(frozen.config, to_yaml(_carried(frozen, config), for_loading=True))
    atomic_write_text(frozen.code / REVISION_FILE, json.dumps(git_revision(source / "scmdm")) + "\n")


def _carried(frozen: FrozenLaunch, config: RunConfig | PrepareConfig) -> RunConfig | PrepareConfig:
    """Copy the shipped base model into the launch directory: a container or another machine may lack the package."""
    base = Path(config.base) if isinstance(config, RunConfig) and config.base is not None else None
    if base is None or not is_shipped(base):
        return config
    copy = frozen.directory / "base"
    shutil.copytree(base, copy)
    return replace_sections(config, base=str(copy))
