"""Plan of a study: the run of every arm, and the settings of every measurement."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import find_model
from scmdm.config.common import resolve_weights_dtype
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.fields import require
from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.config.sampling import SamplerConfig
from scmdm.config.study import StudyConfig
from scmdm.distributed.engine import resolve_precision
from scmdm.errors import UserError
from scmdm.evaluation.study_record import is_sample_row
from scmdm.models.model_files import open_model
from scmdm.sampling.model_loading import rank_device
from scmdm.system.files import sha256_file
from scmdm.system.untrusted import parse_json, read_bytes, reading

logger = logging.getLogger("scmdm")
_DESCRIPTIONS = Verification("descriptions")  # weights are hashed when they are used
_EARLIER_METRIC_KEYS = ("fcd", "moses", "scorer", "mauve", "inception")  # of rows without `metrics_config`


@dataclass(frozen=True)
class StudyModel:
    """A model of the study: an arm, or the base, and the seed of its training."""

    arm: str
    seed: int
    path: Path
    run: Path | None  # run directory; None if the study does not train the model

    @property
    def key(self) -> str:
        """Name that is unique in the study."""
        return self.arm if self.arm == "base" else f"{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Measurement:
    """A measurement of a model: its NELBO, or the quality of samples for one number of steps T and one seed."""

    model: Path
    settings: dict[str, Any]  # everything that the result depends on
    row: Path  # JSON file of the settings and the result
    samples: Path  # file of the samples
    drawn: dict[str, Any] | None = None  # row of the samples in the file, which differs in its metrics alone


@dataclass(frozen=True)
class StudyPlan:
    """Runs and measurements of a study."""

    config: StudyConfig
    out: Path
    data: Path  # directory of the data set

    def check(self, ranks: int = 1, *, later: bool = False) -> None:
        """Load the configuration of every run on `ranks` ranks: a mistake is reported before the first run starts.

        `later`: an earlier job makes the base, so that it may still be missing. Raises UserError, which names the arm.
        """
        shards = self.config.shards
        require(ranks % shards == 0, "shards", shards, f"a divisor of the number of processes, which is {ranks}")
        if self.config.from_scratch:
            self.base_run().check_ranks(ranks)
        elif not later:
            find_model(Path(self.config.base), _DESCRIPTIONS)
        known = self.config.from_scratch or not later
        for arm, seed in self._trained_arms():
            if known or not self.config.arms[arm].from_scratch:
                self.arm_run(arm, seed, self.config.base, ranks)

    def check_samplers(self, length: int) -> None:
        """Raise UserError for a number of steps that is too small for the blocks of samples of `length` tokens."""
        for arm in ("base", *self.config.arms):
            sampler = self.config.sampler_of(arm)
            if sampler.block_start == "sequence":
                for steps in self.config.steps:
                    dataclasses.replace(sampler, steps=steps).check_length(length)

    def _trained_arms(self) -> list[tuple[str, int]]:
        """Arm and seed of every model that is trained."""
        arms = [name for name, arm in self.config.arms.items() if arm.samples_of is None]
        return [(arm, seed) for seed in self.config.adaptation_seeds for arm in arms]

    def evaluation(self) -> EvaluateConfig:
        """Return how models are loaded and evaluated."""
        own = self.config
        return EvaluateConfig(weights_dtype=own.weights_dtype, shards=own.shards, compile=own.compile)

    def base_model(self) -> tuple[StudyModel, RunConfig | None]:
        """Return the base, which may be a run directory, and the configuration of its training if there is one."""
        if not self.config.from_scratch:
            return StudyModel("base", 0, Path(self.config.base), None), None
        run = self.base_run()
        return StudyModel("base", 0, Path(run.run_dir), Path(run.run_dir)), run

    def adaptations(self, base: Path) -> list[tuple[StudyModel, RunConfig]]:
        """Return every model that is trained after the base, which is at `base`, and the configuration of its run."""
        runs = [(arm, seed, self.arm_run(arm, seed, str(base))) for arm, seed in self._trained_arms()]
        return [(StudyModel(arm, seed, Path(run.run_dir), Path(run.run_dir)), run) for arm, seed, run in runs]

    def base_run(self) -> RunConfig:
        """Configuration of the training of the base."""
        own = {"run_dir": str(self.out / "base"), "data.path": str(self.data)}
        run = _load_run(self.config.base_config, own, self.config.base_overrides)
        run.check_command("train")
        return run

    def arm_run(self, arm: str, seed: int, base: str, ranks: int = 1) -> RunConfig:
        """Configuration of the training of an arm on `ranks` ranks. Raises UserError, which names the arm."""
        config, chosen = self.config, self.config.arms[arm]
        own = {"run_dir": str(self.out / f"{arm}-{seed}"), "data.path": str(self.data), "seed": seed}
        try:
            overrides = [*config.overrides, *chosen.overrides]
            adaptation = _load_run(config.adapt_config, own | {"base": base}, overrides)
            if not chosen.from_scratch:
                adaptation.check_command("adapt")
                adaptation.check_ranks(ranks)
                return adaptation
            steps = self._steps_from_scratch(adaptation, base)
            overrides = [*config.base_overrides, f"train.steps={steps}", *chosen.overrides]
            run = _load_run(config.base_config, own, overrides)
            run.check_command("train")
            run.check_ranks(ranks)
        except UserError as error:
            raise UserError(f"arms.{arm}: {error}") from error
        return run

    def _steps_from_scratch(self, adaptation: RunConfig, base: str) -> int:
        """Steps at the base's batch size that process as many sequences as base and adaptation together."""
        trained = self.base_run().train
        done = (
            trained.steps if self.config.from_scratch else open_model(find_model(Path(base), _DESCRIPTIONS)).spec.step
        )
        return done + -(-adaptation.train.steps * adaptation.train.global_batch_size // trained.global_batch_size)

    def measurements(self, model: StudyModel, data_fingerprint: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """Return, per measurement of a model, all settings besides the model that determine the result.

        `metrics` are the keys of the section `metrics` that differ from their defaults.
        """
        config, keys = self.config, self.evaluation()
        chosen = resolve_weights_dtype(keys.weights_dtype, keys.precision)
        common = {
            "arm": model.arm,
            "adaptation_seed": model.seed,
            "split": config.split,
            "data_fingerprint": data_fingerprint,
            "weights_dtype": config.weights_dtype,
            "precision": str(resolve_precision(chosen, rank_device(keys.device))).removeprefix("torch."),
            "compile": config.compile,
        }
        found = []
        if model.arm == "base" or config.arms[model.arm].samples_of is None:
            found.append({**common, "name": f"{model.key}_nelbo", "kind": "nelbo", "num": config.nelbo_samples})
        for steps in config.steps:
            sampler = dataclasses.asdict(dataclasses.replace(config.sampler_of(model.arm), steps=steps))
            found += [
                {
                    **common,
                    "name": f"{model.key}_T{steps}_s{seed}",
                    "kind": "samples",
                    "steps": steps,
                    "sampling_seed": seed,
                    "num": config.num,
                    "sampler": sampler,
                    "metrics_config": metrics,
                }
                for seed in config.sampling_seeds
            ]
        return found


def _load_run(file: str, own: Mapping[str, object], overrides: Sequence[str]) -> RunConfig:
    """Load the configuration of a run. Raises UserError if an override changes `own`, the keys that the study sets."""
    run = load_config(RunConfig, Path(file), [*(f"{key}={value}" for key, value in own.items()), *overrides])
    loaded = {"run_dir": run.run_dir, "data.path": run.data.path, "base": run.base, "seed": run.seed}
    for key, value in own.items():
        if loaded[key] != value:  # an override may name a key or its section
            raise UserError(
                f"{key}={loaded[key]!r} is not possible: the study sets it to {value!r}; leave it out of overrides and "
                "base_overrides"
            )
    return run


def stored_row(path: Path) -> dict[str, Any] | None:
    """Return the row of a finished measurement, with settings that earlier versions did not write; None without one."""
    if not os.path.lexists(path):
        return None
    try:
        with reading(path, "measurement of a study"):
            row = parse_json(read_bytes(path), nan_is_null=True)
            if not isinstance(row, dict) or not (isinstance(row.get("nelbo"), dict) or is_sample_row(row)):
                raise ValueError("not a row of settings and results")
    except UserError as error:
        logger.warning("%s; it is measured again", error)
        return None
    row.setdefault("weights_dtype", "float32")
    row.setdefault("compile", "none")
    if row.get("kind") == "samples" and "metrics_config" not in row:
        row["metrics_config"] = {key: row[key] for key in _EARLIER_METRIC_KEYS if row.get(key)}
    sampler = row.get("sampler")
    if isinstance(sampler, dict):  # it lacks the keys that were added since
        if sampler.get("gumbel") == "float32" and "noise_removal" not in sampler:
            return None  # drawn before the mask took part in the draw
        row["sampler"] = dataclasses.asdict(SamplerConfig()) | sampler
    return row


def has_settings(row: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a row was measured with exactly these settings.

    Rows of earlier versions do not state the precision, which depends on the hardware; it is taken to be this one's.
    """
    return all(row.get(key, value if key == "precision" else None) == value for key, value in settings.items())


def has_samples(row: dict[str, Any], settings: dict[str, Any], samples: Path) -> bool:
    """Whether `samples` is the file of a row that was measured with these settings, besides those of its metrics."""
    drawing = {key: value for key, value in settings.items() if key != "metrics_config"}
    same = settings["kind"] == "samples" and has_settings(row, drawing) and samples.is_file()
    return same and row.get("samples_sha256") == sha256_file(samples)
