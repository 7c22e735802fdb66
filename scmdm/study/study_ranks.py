"""Execution of a study by the ranks of a job: all of them go through its jobs together, in the same order.

Each training is a run of all ranks, each measurement is divided over them. Rank 0 decides what is missing, computes the
metrics and writes. Trainings and measurements have process groups of their own, because collectives of a training time
out, while those of measurements wait as long as all ranks are alive.
"""

from __future__ import annotations

import dataclasses
import gc
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import find_model
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.run import RunConfig
from scmdm.data.manifest import Manifest
from scmdm.domains.domain_registry import load_domain
from scmdm.domains.interface import Domain, EvaluationSettings, MetricKeys, ScoringDomain
from scmdm.runtime.divided_work import ResultParts
from scmdm.sampling.model_loading import evaluation_ranks, load_as_configured, rank_device
from scmdm.study.study_plan import Measurement, StudyModel, StudyPlan
from scmdm.study.study_rows import StudyRows, compute_measurement
from scmdm.system.process_group import current_world, on_rank_0
from scmdm.system.terminal import Terminal
from scmdm.training.trainer import run_training

RANKS = EvaluateConfig()  # how ranks join for measurements and for what rank 0 does alone


class RankedStudyJobs:
    """The jobs of a study on several ranks. A model is measured as soon as it is trained."""

    def __init__(self, plan: StudyPlan, domain: str, metrics_config: MetricKeys, console: Terminal) -> None:
        self._plan, self._console = plan, console
        self._domain_name, self._metrics_config = domain, metrics_config
        self._is_main = current_world().is_main
        self._rows = StudyRows(plan, metrics_config)  # of rank 0; empty on the other ranks
        self._domain: Domain | None = None
        self._threads = torch.get_num_threads()

    def run(self) -> tuple[list[StudyModel], list[dict[str, Any]]]:
        """Run all missing jobs; returns, on rank 0, the models in order and the rows of all measurements."""
        model, run = self._plan.base_model()
        if run is not None:
            self._train(model, run, None)
        base = self._measure(model)
        with evaluation_ranks(RANKS):
            runs = on_rank_0(partial(self._plan.adaptations, base.path))
        for model, run in runs:
            self._train(model, run, base.path if run.base is not None else None)
            self._measure(model)
        return self._rows.results() if self._is_main else ([], [])

    def _train(self, model: StudyModel, run: RunConfig, base: Path | None) -> None:
        if self._is_main:
            self._console.print(f"training {model.key} on {current_world().size} ranks", soft_wrap=True)
        run_training(run, base)
        self._clear()

    def _measure(self, model: StudyModel) -> StudyModel:
        """Compute the missing measurements of a model and of the arms that sample from it; returns it with its path.

        Weights are verified when they are loaded, which happens only if a measurement is missing.
        """
        with evaluation_ranks(RANKS):
            path = find_model(model.path, Verification("sizes", together=True))
            found = dataclasses.replace(model, path=path)
            if tasks := on_rank_0(lambda: self._rows.missing(found)):
                self._compute(path, tasks)
        self._clear()
        return found

    def _compute(self, path: Path, tasks: list[Measurement]) -> None:
        """Compute measurements of the model at `path`."""
        keys, domain = self._plan.evaluation(), self._load_domain()
        loaded = load_as_configured(path, keys)
        for task in tasks:
            model = {name: task.settings[name] for name in ("weights_dtype", "compile")}
            parts = ResultParts.beside(task.row, model=task.settings["model_sha256"], **model)
            place = self._plan.data, self._domain_name
            result = compute_measurement(loaded, task, *place, keys, domain=domain, parts=parts)
            line = on_rank_0(partial(self._finish, task, result, parts))
            if self._is_main:
                self._console.print(line, soft_wrap=True)
        if isinstance(domain, ScoringDomain):  # it occupies memory that a training needs
            self._domain = None

    def _finish(self, task: Measurement, result: dict[str, Any] | None, parts: ResultParts) -> str:
        domain = self._domain
        assert domain is not None
        assert result is not None
        line = self._rows.finish(task, result, lambda: domain)
        parts.remove()
        return line

    def _load_domain(self) -> Domain | None:
        """Return the domain on rank 0 and, if it scores samples, on the other ranks, too."""
        make = load_domain(self._domain_name)
        if self._domain is None and (self._is_main or issubclass(make, ScoringDomain)):
            root = self._plan.data
            settings = EvaluationSettings(self._plan.config.split, str(rank_device("auto")), exclusive=True)
            self._domain = make(root, Manifest.read(root), self._metrics_config, settings)
        return self._domain

    def _clear(self) -> None:
        """Free the memory of a job, and undo what it has set for this process."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.set_num_threads(self._threads)
