"""Execution of a study: training and sampling in worker processes, evaluation in the main process."""

from __future__ import annotations

import dataclasses
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import Any

import torch

from scmdm.checkpoint.reader import find_model
from scmdm.checkpoint.seal import sha256_of_model
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.run import RunConfig
from scmdm.config.sampling import SamplerConfig
from scmdm.data.manifest import Manifest
from scmdm.distributed.engine import resolve_device
from scmdm.domains.domain_registry import changed_keys, load_domain
from scmdm.domains.interface import Domain, EvaluationSettings, GeneratedSamples, MetricKeys
from scmdm.domains.sample_values import write_values
from scmdm.evaluation.evaluate import model_nelbo
from scmdm.sampling.generation import generate
from scmdm.sampling.model_loading import load
from scmdm.sampling.sample_files import write_samples
from scmdm.study.study_display import StudyDisplay
from scmdm.study.study_plan import Measurement, StudyModel, StudyPlan, finished_row
from scmdm.system.files import atomic_write_text, json_text
from scmdm.system.terminal import Terminal
from scmdm.system.worker_processes import unless_stopped, worker_count, worker_processes
from scmdm.training.trainer import run_training


class StudyJobs:
    """The jobs of a study. A model is measured as soon as it is trained."""

    def __init__(
        self, plan: StudyPlan, base: StudyModel, domain: str, metrics_config: MetricKeys, console: Terminal
    ) -> None:
        self._plan, self._base, self._console = plan, base, console
        self._domain_name, self._metrics_config = domain, metrics_config
        self._fingerprint = Manifest.read(plan.data).fingerprint()
        self._models = {base.key: base}
        self._rows: dict[str, dict[str, Any]] = {}
        self._running: dict[Future[Any], StudyModel | Measurement] = {}
        self._domain: Domain | None = None

    def run(self) -> tuple[list[StudyModel], list[dict[str, Any]]]:
        """Run all missing jobs; returns the models in order, and the rows of all measurements."""
        config = self._plan.config
        runs = {
            StudyModel(arm, seed, Path(run.run_dir), Path(run.run_dir)): run
            for arm, seed in self._plan.trained_arms()
            for run in [self._plan.arm_run(arm, seed, str(self._base.path))]
        }
        if self._metrics_config.exclusive_setup:
            self._load_domain()
        # With more cores than runs, each run gets several threads.
        threads = max(1, torch.get_num_threads() // max(1, min(len(runs), worker_count())))
        shown = [
            (f"{config.arms[model.arm].label}, seed {model.seed}", model.path, run.train.steps)
            for model, run in runs.items()
        ]
        display = StudyDisplay(self._console, shown)
        with worker_processes(worker_count()) as pool, display:
            # Start the longest run first, because it would otherwise run alone at the end.
            for model, run in sorted(
                runs.items(), key=lambda item: -item[1].train.steps * item[1].train.global_batch_size
            ):
                run.threads = run.threads or threads
                self._running[pool.submit(unless_stopped, _train, run, self._base.path)] = model
            self._measure(pool, self._base)
            while self._running:
                done, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    job, result = self._running.pop(future), future.result()
                    if isinstance(job, StudyModel):
                        self._measure(pool, dataclasses.replace(job, path=result))
                    else:
                        display.print(self._finish(job, result))
                display.update()
        return self._results()

    def _results(self) -> tuple[list[StudyModel], list[dict[str, Any]]]:
        order = ["base", *self._plan.config.arms]
        models = sorted(self._models.values(), key=lambda model: (model.seed, order.index(model.arm)))
        return models, [self._rows[settings["name"]] for model in models for settings in self._measurements(model)]

    def _measurements(self, model: StudyModel) -> list[dict[str, Any]]:
        return self._plan.measurements(model, self._fingerprint, changed_keys(self._metrics_config))

    def _measure(self, pool: Executor, model: StudyModel) -> None:
        """Submit the missing measurements of a model and of the arms that sample from it."""
        self._models[model.key] = model
        sha256, out = sha256_of_model(model.path), self._plan.out
        for own in self._measurements(model):
            name, settings = own["name"], {**own, "model_sha256": sha256}
            path = out / "evaluations" / f"{name}.json"
            row = finished_row(path, settings)
            if row is not None:
                self._rows[name] = row
                continue
            task = Measurement(model.path, settings, path, out / "samples" / f"{name}.jsonl")
            self._running[pool.submit(unless_stopped, _measure, task, self._plan.data, self._domain_name)] = task
        for name, arm in self._plan.config.arms.items():
            if arm.samples_of == model.arm:
                self._measure(pool, dataclasses.replace(model, arm=name, run=None))

    def _finish(self, task: Measurement, result: dict[str, Any]) -> str:
        """Evaluate a worker's samples and write the row; returns the line to print."""
        name = task.settings["name"]
        if task.settings["kind"] == "nelbo":
            line = f"{name:<24} " + ", ".join(f"{mode} {value['mean']:.4f}" for mode, value in result["nelbo"].items())
        else:
            drawn: GeneratedSamples = result["drawn"]
            domain = self._load_domain()
            measured, first = domain.measure(drawn), domain.metrics[0]
            values_file = task.samples.with_suffix(".npz")
            write_values(values_file, measured.values)
            result = {
                "evaluations": drawn.evaluations,
                "seconds": drawn.seconds,
                "metrics": measured.metrics,
                "samples_file": str(task.samples.relative_to(self._plan.out)),
                "values_file": str(values_file.relative_to(self._plan.out)),
            }
            value = measured.metrics[first.name]
            quality = f"{first.title}: {'unknown' if value is None else f'{first.scale * value:.{first.digits}f}'}"
            line = f"{name:<24} {quality}, {drawn.evaluations} evaluations, {drawn.seconds:.1f} s"
        row = {**task.settings, **result}
        task.row.parent.mkdir(exist_ok=True)
        atomic_write_text(task.row, json_text(row))
        self._rows[name] = row
        return line

    def _load_domain(self) -> Domain:
        if self._domain is None:
            root = self._plan.data
            settings = EvaluationSettings(self._plan.config.split, resolve_device("auto").type)
            make = load_domain(self._domain_name)
            self._domain = make(root, Manifest.read(root), self._metrics_config, settings)
        return self._domain


def _train(run: RunConfig, base: Path) -> Path:
    """Train or resume a run in a worker, from the base if it is an adaptation; returns the checkpoint."""
    return find_model(run_training(run, base if run.base is not None else None))


def _measure(task: Measurement, root: Path, domain: str) -> dict[str, Any]:
    """Estimate the NELBO, or draw and write samples, in a worker."""
    torch.set_num_threads(1)
    loaded, settings = load(task.model), task.settings
    if settings["kind"] == "nelbo":
        config = EvaluateConfig(split=settings["split"], nelbo_samples=settings["num"])
        found = model_nelbo(loaded, root, config)
        return {"nelbo": {mode: dataclasses.asdict(value) for mode, value in found.items()}}
    num = settings["num"]
    templates_NL = load_domain(domain).templates(root, Manifest.read(root), settings["split"], num)
    drawn = generate(
        loaded,
        SamplerConfig(**settings["sampler"]),
        num=num if templates_NL is None else 1,
        seed=settings["sampling_seed"],
        templates_PL=templates_NL,
    )
    write_samples(task.samples, drawn, loaded.tokenizer)
    return {"drawn": drawn}
