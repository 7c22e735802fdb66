"""`scmdm study`: prepare, (pre)train, adapt in several arms, sample, evaluate, report. Every part is skipped when it is
done, so the same command goes on where it was interrupted.

Adaptations and samples are jobs of worker processes, as many at once as there are cores; what they have drawn is
evaluated here."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from scmdm.checkpoint.reader import find_model
from scmdm.checkpoint.seal import sha256_of_model
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.loading import load_config, to_yaml
from scmdm.config.preparation import PrepareConfig
from scmdm.config.run import RunConfig
from scmdm.config.sampling import SamplerConfig
from scmdm.config.study import ArmConfig, StudyConfig
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.prepare import prepare
from scmdm.distributed.engine import resolve_device
from scmdm.domains.interface import Asked, Domain, GeneratedSamples, decode_split
from scmdm.domains.registry import domain_of
from scmdm.domains.text.text_quality import check_scorer
from scmdm.errors import UserError
from scmdm.evaluation.evaluate import model_nelbo
from scmdm.evaluation.report import print_summary, study_report
from scmdm.models.model_files import open_model
from scmdm.observability.environment import describe_environment
from scmdm.sampling.generation import generate, load
from scmdm.sampling.sample_files import write_samples
from scmdm.study.progress import StudyDisplay
from scmdm.system.files import atomic_write_bytes, atomic_write_text
from scmdm.system.worker_processes import unless_stopped, worker_count, worker_processes
from scmdm.training.trainer import run_training

console = Console()
_HELD_OUT = 4096  # at most so many sequences
_LATER_KEYS = ("moses", "scorer", "mauve", "inception")
_OWN_KEYS = ("run_dir", "data.path", "base", "seed")  # of a run: the study gives them


@dataclass(frozen=True)
class Model:
    """A model of the study: an arm and the seed it was trained with."""

    arm: str
    seed: int
    path: Path
    run: Path | None  # None where the arm trains nothing

    @property
    def key(self) -> str:
        return self.arm if self.arm == "base" else f"{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Task:
    """Something to measure of a model. Its row is of use again only for the same settings."""

    model: Path
    settings: dict[str, Any]  # all that the result depends on
    row: Path
    samples: Path  # where they go


def run_study(config: StudyConfig) -> Path:
    """Run what is missing and write `report.html`; returns the study directory."""
    started = time.perf_counter()
    config, out = config.selected(), Path(config.out)
    prepare_config = load_config(PrepareConfig, Path(config.prepare))
    _check_runs(config, out, prepare_config.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare(prepare_config)
    _check_measures(config, Path(prepare_config.out))
    base = _base(config, out, prepare_config.out)
    models, evaluations = _Jobs(config, out, base, Path(prepare_config.out)).run()
    root = Path(prepare_config.out)
    manifest = Manifest.read(root)
    tokenizer = manifest.tokenizer.file
    atomic_write_bytes(out / tokenizer, (root / tokenizer).read_bytes())
    study = {
        "title": config.title,
        "domain": domain_of(manifest).name,
        "tokenizer": tokenizer,
        "held_out": _keep_held_out(root, manifest, config.split, out),
        "config": to_yaml(config),
        "environment": describe_environment(),
        "reference": config.reference,
        "arms": _describe_arms(config, models, evaluations),
        "evaluations": evaluations,
    }
    atomic_write_text(out / "study.json", json.dumps(study, indent=1) + "\n")
    print_summary(study_report(out, out / "report.html"))
    minutes = (time.perf_counter() - started) / 60
    console.print(f"report: {out / 'report.html'} ({minutes:.1f} minutes)", highlight=False, soft_wrap=True)
    return out


def _check_measures(config: StudyConfig, root: Path) -> None:
    """What can be known to be wrong of them before anything is trained."""
    manifest = Manifest.read(root)
    manifest.split(config.split, root)
    if config.scorer is not None:
        check_scorer(Path(config.scorer))


def _keep_held_out(root: Path, manifest: Manifest, split: str, out: Path) -> str:
    """Data for the report to draw beside samples, spread evenly over the split; returns its file's name."""
    texts = decode_split(root, manifest, split)
    chosen = np.linspace(0, len(texts) - 1, min(len(texts), _HELD_OUT), dtype=np.int64)
    name = f"held_out_{split}.jsonl"
    atomic_write_text(out / name, "".join(json.dumps({"text": texts[i], "framed": True}) + "\n" for i in chosen))
    return name


def _check_runs(config: StudyConfig, out: Path, data: str) -> None:
    """Every run's configuration, read before the first one starts: a mistake must not show after an hour."""
    if config.from_scratch:
        _base_config(config, out, data)
    else:
        find_model(Path(config.base))
    for arm, seed in _trained_arms(config):
        _arm_config(config, out, config.base, data, arm, seed)


def _trained_arms(config: StudyConfig) -> list[tuple[str, int]]:
    arms = [name for name, arm in config.arms.items() if arm.samples_of is None]
    return [(arm, seed) for seed in config.adaptation_seeds for arm in arms]


def _base(config: StudyConfig, out: Path, data: str) -> Model:
    if not config.from_scratch:
        return Model("base", 0, find_model(Path(config.base)), None)
    run = _base_config(config, out, data)
    run_training(run, None)
    return Model("base", 0, find_model(Path(run.run_dir)), Path(run.run_dir))


def _base_config(config: StudyConfig, out: Path, data: str) -> RunConfig:
    overrides = [f"run_dir={out / 'base'}", f"data.path={data}", *config.base_overrides]
    return load_config(RunConfig, Path(config.base_config), overrides)


def _arm_config(config: StudyConfig, out: Path, base: str, data: str, arm: str, seed: int) -> RunConfig:
    """The run of an arm that is trained; UserError names the arm."""
    chosen = config.arms[arm]
    own = [f"run_dir={out / f'{arm}-{seed}'}", f"data.path={data}", f"seed={seed}"]
    try:
        for override in [*config.overrides, *chosen.overrides]:
            if (key := override.partition("=")[0]) in _OWN_KEYS:
                raise UserError(f"{key} is the study's to give; leave it out of overrides")
        adaptation = load_config(
            RunConfig, Path(config.adapt_config), [*own, f"base={base}", *config.overrides, *chosen.overrides]
        )
        if not chosen.from_scratch:
            adaptation.check_command("adapt")
            return adaptation
        steps = _total_steps(config, out, base, data, adaptation)
        overrides = [*own, *config.base_overrides, f"train.steps={steps}", *chosen.overrides]
        run = load_config(RunConfig, Path(config.base_config), overrides)
        run.check_command("train")
    except UserError as error:
        raise UserError(f"arms.{arm}: {error}") from error
    return run


def _total_steps(config: StudyConfig, out: Path, base: str, data: str, adaptation: RunConfig) -> int:
    """Steps of base_config's batches that hold as many sequences as the base and the adaptation have seen."""
    trained = _base_config(config, out, data).train
    batch = trained.global_batch_size
    done = trained.steps if config.from_scratch else open_model(find_model(Path(base))).spec.step
    return done + -(-adaptation.train.steps * adaptation.train.global_batch_size // batch)


class _Jobs:
    """All adaptations, and every model's evaluations as soon as the model is there."""

    def __init__(self, config: StudyConfig, out: Path, base: Model, root: Path) -> None:
        self._config, self._out, self._base, self._root = config, out, base, root
        self._fingerprint = Manifest.read(root).fingerprint()
        self._models = {base.key: base}
        self._rows: dict[str, dict[str, Any]] = {}
        self._domain: Domain | None = None

    def run(self) -> tuple[list[Model], list[dict[str, Any]]]:
        """The models in their order, and the rows of their evaluations."""
        adaptations, order = self._adaptations(), ["base", *self._config.arms]
        if self._config.moses:
            self._get_domain()  # its first use on a machine takes all cores for a while
        # On many cores an adaptation has several.
        threads = max(1, torch.get_num_threads() // max(1, min(len(adaptations), worker_count())))
        display = StudyDisplay(console, [(name, Path(run.run_dir), run.train.steps) for name, run in adaptations])
        with worker_processes(worker_count()) as pool, display:
            running: dict[Future[Any], Model | Task] = {}

            def evaluate(model: Model) -> None:
                self._models[model.key] = model
                for task in self._open_tasks(model):
                    running[pool.submit(unless_stopped, _measure, task, self._root)] = task
                for name, arm in self._config.arms.items():
                    if arm.samples_of == model.arm:
                        evaluate(dataclasses.replace(model, arm=name, run=None))

            jobs = zip(adaptations, _trained_arms(self._config), strict=True)
            # The longest first, or it would be alone in the end.
            for (_, run), (arm, seed) in sorted(jobs, key=lambda job: -_sequences(job[0][1])):
                model = Model(arm, seed, Path(run.run_dir), Path(run.run_dir))
                run.threads = run.threads or threads
                running[pool.submit(unless_stopped, _train, run, self._base.path)] = model
            evaluate(self._base)
            while running:
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    job, result = running.pop(future), future.result()
                    if isinstance(job, Model):
                        evaluate(dataclasses.replace(job, path=result))
                    else:
                        display.print(self._finish(job, result))
                display.update()
        models = sorted(self._models.values(), key=lambda model: (model.seed, order.index(model.arm)))
        return models, [self._rows[name] for model in models for name in self._names(model)]

    def _adaptations(self) -> list[tuple[str, RunConfig]]:
        """What to call it, and the run."""
        config, base, data = self._config, str(self._base.path), str(self._root)
        return [
            (f"{config.arms[arm].label}, seed {seed}", _arm_config(config, self._out, base, data, arm, seed))
            for arm, seed in _trained_arms(config)
        ]

    def _open_tasks(self, model: Model) -> Iterator[Task]:
        """What is to be measured of a model and is not yet."""
        sha256 = sha256_of_model(model.path)
        for settings in _settings(self._config, model, self._fingerprint):
            name = settings["name"]
            row = self._out / "evaluations" / f"{name}.json"
            settings = {**settings, "model_sha256": sha256}
            found = _read_row(row, settings)
            if found is not None:
                self._rows[name] = found
            else:
                yield Task(model.path, settings, row, self._out / "samples" / f"{name}.jsonl")

    def _names(self, model: Model) -> list[str]:
        return [settings["name"] for settings in _settings(self._config, model, self._fingerprint)]

    def _finish(self, task: Task, result: dict[str, Any]) -> str:
        """Evaluate what a worker has drawn and keep the row; returns the line to show."""
        name = task.settings["name"]
        if task.settings["kind"] == "nelbo":
            line = f"{name:<24} " + ", ".join(f"{mode} {value['mean']:.4f}" for mode, value in result["nelbo"].items())
        else:
            drawn: GeneratedSamples = result["drawn"]
            domain = self._get_domain()
            metrics, first = domain.measure(drawn), domain.metrics[0]
            result = {
                "evaluations": drawn.evaluations,
                "seconds": drawn.seconds,
                "metrics": metrics,
                "samples_file": str(task.samples.relative_to(self._out)),
            }
            value = metrics[first.name]
            quality = f"{first.title}: {'unknown' if value is None else f'{first.scale * value:.{first.digits}f}'}"
            line = f"{name:<24} {quality}, {drawn.evaluations} evaluations, {drawn.seconds:.1f} s"
        row = {**task.settings, **result}
        task.row.parent.mkdir(exist_ok=True)
        atomic_write_text(task.row, json.dumps(row) + "\n")
        self._rows[name] = row
        return line

    def _get_domain(self) -> Domain:
        if self._domain is None:
            manifest = Manifest.read(self._root)
            config = self._config
            device = resolve_device("auto").type
            asked = Asked(config.split, config.fcd, config.moses, config.scorer, config.mauve, config.inception, device)
            self._domain = domain_of(manifest)(self._root, manifest, asked)
        return self._domain


def _sequences(run: RunConfig) -> int:
    return run.train.steps * run.train.global_batch_size


def _train(run: RunConfig, base: Path) -> Path:
    """In a worker: train, or go on training, from the base if the run has one; returns the checkpoint."""
    return find_model(run_training(run, open_model(base) if run.base is not None else None))


def _measure(task: Task, root: Path) -> dict[str, Any]:
    """In a worker: the NELBO, or samples, written and returned."""
    torch.set_num_threads(1)
    loaded, settings = load(task.model), task.settings
    if settings["kind"] == "nelbo":
        asked = EvaluateConfig(split=settings["split"], nelbo_samples=settings["num"])
        found = model_nelbo(loaded, root, asked)
        return {"nelbo": {mode: dataclasses.asdict(value) for mode, value in found.items()}}
    num, manifest = settings["num"], Manifest.read(root)
    given = domain_of(manifest).given(root, manifest, settings["split"], num)
    drawn = generate(
        loaded,
        SamplerConfig(**settings["sampler"]),
        num=num if given is None else 1,
        seed=settings["sampling_seed"],
        templates_PL=given,
    )
    write_samples(task.samples, drawn, loaded.tokenizer)
    return {"drawn": drawn}


def _settings(config: StudyConfig, model: Model, data: str) -> Iterator[dict[str, Any]]:
    """What is to be measured, with all but the model that its result depends on."""
    common = {"arm": model.arm, "adaptation_seed": model.seed, "split": config.split, "data_fingerprint": data}
    if model.arm == "base" or config.arms[model.arm].samples_of is None:
        yield {**common, "name": f"{model.key}_nelbo", "kind": "nelbo", "num": config.nelbo_samples}
    for steps in config.steps:
        for seed in config.sampling_seeds:
            name = f"{model.key}_T{steps}_s{seed}"
            sampler = dataclasses.asdict(dataclasses.replace(config.sampler_of(model.arm), steps=steps))
            yield {
                **common,
                "name": name,
                "kind": "samples",
                "steps": steps,
                "sampling_seed": seed,
                "num": config.num,
                "sampler": sampler,
                "fcd": config.fcd,
                # Later keys only when they are set: a row that was made without them stays of use.
                **{key: value for key in _LATER_KEYS if (value := getattr(config, key))},
            }


def _read_row(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A finished evaluation, if it is of this very model and these settings."""
    if not path.is_file():
        return None
    row: dict[str, Any] = json.loads(path.read_text())
    return row if all(row.get(key) == value for key, value in settings.items()) else None


def _describe_arms(config: StudyConfig, models: list[Model], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    arms = []
    for name in dict.fromkeys(model.arm for model in models):
        own = [model for model in models if model.arm == name]
        nelbo = [row["nelbo"] for row in evaluations if row["arm"] == name and row["kind"] == "nelbo"]
        arm = ArmConfig(label="base") if name == "base" else config.arms[name]
        source = own[0].arm if arm.samples_of is None else arm.samples_of
        arms.append(
            {
                "name": name,
                "label": arm.label,
                "rate": 0.0 if source == "base" else _settings_of(own[0].path)["self_conditioning"]["rate"],
                "from_scratch": arm.from_scratch,
                "samples_of": arm.samples_of,
                "runs": [str(model.run.relative_to(config.out)) for model in own if model.run is not None],
                "nelbo": nelbo,
                "cost": [_cost(model.path) for model in own if model.run is not None],
            }
        )
    return arms


def _cost(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    batch = _settings_of(checkpoint)["train"]["global_batch_size"]
    cost = {key: state[key] for key in ("step", "tokens", "seconds", "evaluations")}
    return {**cost, "sequences": state["step"] * batch}


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((checkpoint / "config.yaml").read_text())
    return settings
