"""Execution of a study in one process: training and sampling in worker processes, evaluation in the main process."""

from __future__ import annotations

import dataclasses
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scmdm.checkpoint.reader import find_model
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.run import RunConfig
from scmdm.data.manifest import Manifest
from scmdm.distributed.engine import resolve_device
from scmdm.domains.domain_registry import load_domain
from scmdm.domains.interface import Domain, EvaluationSettings, MetricKeys
from scmdm.sampling.model_loading import load_as_configured
from scmdm.study.study_display import StudyDisplay
from scmdm.study.study_plan import Measurement, StudyModel, StudyPlan
from scmdm.study.study_rows import StudyRows, compute_measurement
from scmdm.system.terminal import Terminal
from scmdm.system.worker_processes import unless_stopped, worker_count, worker_processes
from scmdm.training.trainer import run_training


class StudyJobs:
    """The jobs of a study. A model is measured as soon as it is trained."""

    def __init__(self, plan: StudyPlan, domain: str, metrics_config: MetricKeys, console: Terminal) -> None:
        self._plan, self._console = plan, console
        self._domain_name, self._metrics_config = domain, metrics_config
        self._rows = StudyRows(plan, metrics_config)
        self._running: dict[Future[Any], StudyModel | Measurement] = {}
        self._domain: Domain | None = None

    def run(self) -> tuple[list[StudyModel], list[dict[str, Any]]]:
        """Run all missing jobs; returns the models in order, and the rows of all measurements."""
        base = self._train_base()
        runs = dict(self._plan.adaptations(base.path))
        if self._metrics_config.exclusive_setup:
            self._load_domain()
        # With more cores than runs, each run gets several threads.
        threads = max(1, torch.get_num_threads() // max(1, min(len(runs), worker_count())))
        arms = self._plan.config.arms
        shown = [
            (f"{arms[model.arm].label}, seed {model.seed}", model.path, run.train.steps) for model, run in runs.items()
        ]
        display = StudyDisplay(self._console, shown)
        with worker_processes(worker_count()) as pool, display:
            # Start the longest run first, because it would otherwise run alone at the end.
            for model, run in sorted(
                runs.items(), key=lambda item: -item[1].train.steps * item[1].train.global_batch_size
            ):
                run.threads = run.threads or threads
                self._running[pool.submit(unless_stopped, _train, run, base.path)] = model
            self._measure(pool, base)
            while self._running:
                done, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    job, result = self._running.pop(future), future.result()
                    if isinstance(job, StudyModel):
                        self._measure(pool, dataclasses.replace(job, path=result))
                    else:
                        display.print(self._rows.finish(job, result, self._load_domain))
                display.update()
        return self._rows.results()

    def _train_base(self) -> StudyModel:
        """Return the base, after training it if the study has no `base`."""
        model, run = self._plan.base_model()
        if run is not None:
            run_training(run, None)
        return dataclasses.replace(model, path=find_model(model.path))

    def _measure(self, pool: Executor, model: StudyModel) -> None:
        """Submit the missing measurements of a model and of the arms that sample from it."""
        measure = partial(_measure, root=self._plan.data, domain=self._domain_name, keys=self._plan.evaluation())
        for task in self._rows.missing(model):
            self._running[pool.submit(unless_stopped, measure, task)] = task

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


def _measure(task: Measurement, root: Path, domain: str, keys: EvaluateConfig) -> dict[str, Any] | None:
    """Estimate the NELBO, or draw and write samples, in a worker."""
    torch.set_num_threads(1)
    return compute_measurement(load_as_configured(task.model, keys), task, root, domain, keys)
