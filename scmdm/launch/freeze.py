"""Freeze code and configuration when a job is submitted.

A job runs the copies made here, so that editing a file does not change a queued or requeued job. Inputs that come with
scmdm are copied, too: a container or another machine may lack them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from scmdm.checkpoint.reader import find_model
from scmdm.config.conversion import ExportConfig
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.fields import require
from scmdm.config.loading import copy_with_parents, load_config, replace_inputs, to_yaml
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.config.sampling import SampleConfig
from scmdm.config.shipped import shipped_input
from scmdm.config.study import StudyConfig
from scmdm.data.preparation.shard_writer import check_place
from scmdm.data.preparation.source import make_source
from scmdm.errors import UserError
from scmdm.launch.rank import TRAINING
from scmdm.observability.environment import REVISION_FILE, git_revision
from scmdm.study.study_plan import StudyPlan
from scmdm.system.files import atomic_write_text, cannot_write
from scmdm.system.run_directory import EVALUATIONS, LAUNCH, STACKS, run_of

ONE_PROCESS = ("export",)  # commands that ranks cannot share
_PACKAGES = ("scmdm", "data_prep")
_LEFT_OUT = ("configs",)  # a wheel has the shipped configurations in the package

LaunchedConfig: TypeAlias = RunConfig | PrepareConfig | SampleConfig | EvaluateConfig | StudyConfig | ExportConfig


@dataclass(frozen=True)
class FrozenLaunch:
    """Directory of one launch: `RUN/launch/TIME` of a run, `OUT.launch/TIME` of everything else that is written.

    It contains `code/`, `config.yaml`, `logs/` and, on SLURM, `job.sbatch`.
    """

    command: str
    target: Path  # run directory, or what the command writes
    directory: Path
    words: tuple[str, ...] = ()  # arguments of the command besides its configuration: a model, an output
    shipped_model: Path | None = None  # original of the model in `words`, if that is a copy

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
    def trains(self) -> bool:
        """Whether the command writes checkpoints, from which a later start continues."""
        return self.command in TRAINING

    @property
    def stacks(self) -> Path:
        """Directory of the stacks that a hang leaves, and of NCCL's flight recorder."""
        return self.target / STACKS if self.trains else self.directory / STACKS

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make Python import the copy. Without PYTHONSAFEPATH `-m` prefers the working directory."""
        return {"PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}

    def arguments(self, config: str) -> list[str]:
        """Arguments of `python -m scmdm`, with the configuration at `config`."""
        return [self.command, *self.words, "--config", config] if self.words else [self.command, config]


@dataclass(frozen=True)
class ResolvedLaunch:
    """What will be launched, checked: nothing has been written."""

    command: str
    config: LaunchedConfig
    target: Path
    launches: Path  # directory of all launches of this target
    words: tuple[str, ...] = ()


def resolve(
    command: str,
    subject: Path,
    overrides: list[str],
    *,
    config: Path | None = None,
    ranks: int = 1,
    later: bool = False,
) -> ResolvedLaunch:
    """Load and check the configuration of `command` on `ranks` ranks, or tasks for prepare.

    `subject` is the command's first argument: a YAML file, or a model. `later`: an earlier job makes the model, so that
    it may still be missing. `overrides` may begin with further arguments; `config` is the YAML file of a command with a
    model. Raises UserError for mistakes in any of them.
    """
    if command not in _RESOLVERS:
        raise UserError(f"command {command!r} is not possible; it must be one of {', '.join(_RESOLVERS)}")
    words = [word for word in overrides if "=" not in word]
    keys = [word for word in overrides if "=" in word]
    possible = 1 if command == "export" else 0
    if len(words) != possible:
        wanted = "one directory to create" if possible else "left out; give keys as key=value"
        raise UserError(f"arguments {words} are not possible with {command} {subject}; they must be {wanted}")
    if config is not None and command not in _OF_MODELS:
        raise UserError(f"--config {config} is not possible with {command}, whose YAML file is {subject}")
    if command in _OF_MODELS and not later:
        find_model(subject)
    return _RESOLVERS[command](_Given(command, subject, tuple(words), keys, config, ranks, later))


@dataclass(frozen=True)
class _Given:
    command: str
    subject: Path
    words: tuple[str, ...]
    keys: list[str]
    config: Path | None
    ranks: int
    later: bool


def _training(given: _Given) -> ResolvedLaunch:
    config = load_config(RunConfig, given.subject, given.keys)
    config.check_command(given.command)
    config.check_ranks(given.ranks)
    target = _absolute(config.run_dir)
    return ResolvedLaunch(given.command, config, target, target / LAUNCH)


def _preparation(given: _Given) -> ResolvedLaunch:
    config = load_config(PrepareConfig, given.subject, given.keys)
    require(config.slice is None, "slice", config.slice, "left out: --array divides the work")
    dataclasses.replace(config, slice=f"0/{given.ranks}").validate()
    check_place(Path(config.out))
    make_source(config).files()
    return _output("prepare", config, config.out)


def _study(given: _Given) -> ResolvedLaunch:
    config = load_config(StudyConfig, given.subject, given.keys)
    data = load_config(PrepareConfig, Path(config.prepare)).out
    StudyPlan(config.selected(), Path(config.out), Path(data)).check(given.ranks, later=given.later)
    return _output("study", config, config.out)


def _sampling(given: _Given) -> ResolvedLaunch:
    config = load_config(SampleConfig, given.config, given.keys)
    if config.out is None:
        raise UserError("`out` is not set; give out=FILE: a job has no terminal to print samples on")
    return _output("sample", config, config.out, (str(given.subject),))


def _evaluation(given: _Given) -> ResolvedLaunch:
    config = load_config(EvaluateConfig, given.config, given.keys)
    words, model = (str(given.subject),), given.subject
    if config.out is not None:
        return _output("evaluate", config, config.out, words)
    run = run_of(model) or (model if (model / LAUNCH).is_dir() else None)
    if run is None:
        return _output("evaluate", config, str(Path(EVALUATIONS) / _absolute(str(model)).name), words)
    target = _absolute(str(run))
    return ResolvedLaunch("evaluate", config, target, target / LAUNCH, words)


def _export(given: _Given) -> ResolvedLaunch:
    (out,) = given.words
    return _output("export", load_config(ExportConfig, given.config, given.keys), out, (str(given.subject), out))


def _output(command: str, config: LaunchedConfig, out: str, words: tuple[str, ...] = ()) -> ResolvedLaunch:
    """Resolve a command that writes `out`; its launches are beside `out`, which appears only when it is complete."""
    target = _absolute(out)
    return ResolvedLaunch(command, config, target, target.with_name(f"{target.name}.launch"), words)


def _absolute(path: str) -> Path:
    return Path(os.path.realpath(path))


_RESOLVERS = {
    **dict.fromkeys(TRAINING, _training),
    "prepare": _preparation,
    "sample": _sampling,
    "evaluate": _evaluation,
    "study": _study,
    "export": _export,
}
_OF_MODELS = ("sample", "evaluate", "export")


def plan_launch(resolved: ResolvedLaunch) -> FrozenLaunch:
    """Choose a new launch directory. Nothing is written."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    taken = {path.name for path in resolved.launches.glob(f"{name}*")}
    free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)
    directory, words = resolved.launches / free, resolved.words
    shipped = shipped_input(words[0]) if words else None
    if shipped is not None:
        words = (str(directory / "model" / shipped.name), *words[1:])  # its name is that of the output without `out`
    return FrozenLaunch(resolved.command, resolved.target, directory, words, shipped)


def freeze(frozen: FrozenLaunch, config: LaunchedConfig) -> None:
    """Copy code, configuration and shipped inputs into the launch directory."""
    source = Path(__file__).resolve().parents[2]
    try:
        frozen.logs.mkdir(parents=True)
        for package in _PACKAGES:
            if (source / package).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", *_LEFT_OUT)
                shutil.copytree(source / package, frozen.code / package, ignore=ignore)
        if frozen.shipped_model is not None:
            shutil.copytree(frozen.shipped_model, Path(frozen.words[0]))
        config = _carried(frozen.directory, config)
    except OSError as error:
        raise cannot_write(frozen.directory, error) from error
    atomic_write_text(frozen.config, to_yaml(config, for_loading=True))
    atomic_write_text(frozen.code / REVISION_FILE, json.dumps(git_revision(source / "scmdm")) + "\n")


def _carried(directory: Path, config: LaunchedConfig) -> LaunchedConfig:
    """Copy the files that the job would load, and shipped inputs, into the launch directory; return their new paths."""
    config = copy.deepcopy(config)
    if isinstance(config, StudyConfig):
        prepared = _carried(directory, load_config(PrepareConfig, Path(config.prepare)))
        config.prepare = str(directory / "prepare.yaml")
        atomic_write_text(Path(config.prepare), to_yaml(prepared, for_loading=True))
        # These two are not complete without the keys that the study sets, and one that no run needs may be missing.
        for name in ("base_config", "adapt_config"):
            if Path(getattr(config, name)).exists():
                copy_with_parents(Path(getattr(config, name)), directory / f"{name}.yaml")
                setattr(config, name, str(directory / f"{name}.yaml"))
    replace_inputs(config, functools.partial(_carry, directory))
    return config  # the keys of metrics stay: they are settings of the results, which other launches continue


def _carry(directory: Path, name: str, value: str) -> str:
    """Copy an input that comes with scmdm into the launch directory, under the name of its key; return its path."""
    shipped = shipped_input(value)
    if shipped is None:
        return value
    target = directory / f"{name}{shipped.suffix if shipped.is_file() else ''}"
    (shutil.copyfile if shipped.is_file() else shutil.copytree)(shipped, target)
    return str(target)
