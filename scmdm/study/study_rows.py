"""Rows of a study: which measurements are missing, how one is computed, and what is written of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scmdm.checkpoint.seal import sha256_of_model
from scmdm.config.common import resolve_weights_dtype
from scmdm.config.evaluation import EvaluateConfig
from scmdm.config.sampling import SamplerConfig
from scmdm.data.manifest import Manifest
from scmdm.domains.domain_registry import changed_keys, load_domain, main_metric
from scmdm.domains.interface import Domain, GeneratedSamples, MetricKeys
from scmdm.domains.sample_values import write_values
from scmdm.evaluation.evaluate import draw_and_score, model_nelbo, sample_templates, sampling_cost, score_divided
from scmdm.models.model_files import LoadedModel
from scmdm.runtime.divided_work import ResultParts
from scmdm.sampling.generation import SampleSet
from scmdm.sampling.sample_files import read_samples, write_samples
from scmdm.study.study_plan import Measurement, StudyModel, StudyPlan, has_samples, has_settings, stored_row
from scmdm.system.files import atomic_write_text, json_text, sha256_file
from scmdm.system.process_group import joined_world


class StudyRows:
    """Rows of a study's measurements. Finished ones are read; others are evaluated by a domain and written."""

    def __init__(self, plan: StudyPlan, metrics_config: MetricKeys) -> None:
        self._plan = plan
        self._metrics = changed_keys(metrics_config)
        self._fingerprint = Manifest.read(plan.data).fingerprint()
        self._models: dict[str, StudyModel] = {}
        self._rows: dict[str, dict[str, Any]] = {}

    def missing(self, model: StudyModel) -> list[Measurement]:
        """Return the missing measurements of a model and of the arms that sample from it."""
        found, out = [], self._plan.out
        arms = [name for name, arm in self._plan.config.arms.items() if arm.samples_of == model.arm]
        sha256 = sha256_of_model(model.path)
        for measured in [model, *(dataclasses.replace(model, arm=name, run=None) for name in arms)]:
            self._models[measured.key] = measured
            for own in self._settings(measured):
                name, settings = own["name"], {**own, "model_sha256": sha256}
                path, samples = out / "evaluations" / f"{name}.json", out / "samples" / f"{name}.jsonl"
                row = stored_row(path)
                if row is not None and has_settings(row, settings):
                    self._rows[name] = row
                    continue
                drawn = row if row is not None and has_samples(row, settings, samples) else None
                found.append(Measurement(model.path, settings, path, samples, drawn))
        return found

    def finish(self, task: Measurement, result: dict[str, Any], domain: Callable[[], Domain]) -> str:
        """Evaluate a result of `compute_measurement` and write the row; returns the line to print."""
        name = task.settings["name"]
        if task.settings["kind"] == "nelbo":
            line = f"{name:<24} " + ", ".join(f"{mode} {value['mean']:.4f}" for mode, value in result["nelbo"].items())
        else:
            result, line = self._evaluate(task, result["drawn"], domain())
        row = {**task.settings, **result}
        task.row.parent.mkdir(exist_ok=True)
        atomic_write_text(task.row, json_text(row))
        self._rows[name] = row
        return line

    def _evaluate(self, task: Measurement, drawn: GeneratedSamples, domain: Domain) -> tuple[dict[str, Any], str]:
        measured, first = domain.measure(drawn), main_metric(type(domain), self._plan.config.metric)
        values_file = task.samples.with_suffix(".npz")
        write_values(values_file, measured.values)
        result = {
            "drawn": len(drawn.texts),  # fewer than `num` if there are fewer prompts
            "evaluations": drawn.evaluations,
            **sampling_cost(drawn, padded=False),
            "seconds": drawn.seconds,
            "metrics": measured.metrics,
            "samples_file": str(task.samples.relative_to(self._plan.out)),
            "samples_sha256": sha256_file(task.samples),
            "values_file": str(values_file.relative_to(self._plan.out)),
        }
        if task.drawn is not None and "cache_deviation" in task.drawn:
            result["cache_deviation"] = task.drawn["cache_deviation"]
        value = measured.metrics.get(first.name)
        quality = f"{first.title}: {'unknown' if value is None else f'{first.scale * value:.{first.digits}f}'}"
        name = task.settings["name"]
        line = f"{name:<24} {quality}, {drawn.evaluations} evaluations, {drawn.seconds:.1f} s"
        if drawn.cache_deviation is not None:
            line += f", cache against none: {drawn.cache_deviation.describe()}"
        return result, line

    def results(self) -> tuple[list[StudyModel], list[dict[str, Any]]]:
        """Return the models in order, and the rows of all measurements."""
        order = ["base", *self._plan.config.arms]
        models = sorted(self._models.values(), key=lambda model: (model.seed, order.index(model.arm)))
        return models, [self._rows[settings["name"]] for model in models for settings in self._settings(model)]

    def _settings(self, model: StudyModel) -> list[dict[str, Any]]:
        return self._plan.measurements(model, self._fingerprint, self._metrics)


def compute_measurement(
    loaded: LoadedModel,
    task: Measurement,
    root: Path,
    domain_name: str,
    keys: EvaluateConfig,
    *,
    domain: Domain | None = None,
    parts: ResultParts | None = None,
) -> dict[str, Any] | None:
    """Estimate the NELBO, or draw, score and write samples, divided over the ranks, which call this together.

    Samples that the task's file has already are read instead. Returns the result on rank 0, None on the other ranks.
    `domain`, if it scores samples, must be given on all ranks; without one, the samples are not scored. `loaded` was
    loaded as `keys` say.
    """
    settings = task.settings
    num = settings["num"]
    config = dataclasses.replace(keys, split=settings["split"], nelbo_samples=num, num=num)
    if settings["kind"] == "nelbo":
        found = model_nelbo(loaded, root, config, parts)
        return {"nelbo": {mode: dataclasses.asdict(value) for mode, value in found.items()}} if found else None
    if task.drawn is not None:
        known = read_samples(task.samples, task.drawn["seconds"]) if joined_world()[0] == 0 else None
        own = {"samples": task.drawn["samples_sha256"], "metrics": settings["metrics_config"]}
        known = score_divided(domain, known, None if parts is None else parts.of(**own))
        return None if known is None else {"drawn": known}
    kind = load_domain(domain_name)
    templates_NL, lengths_N = sample_templates(loaded, kind, root, Manifest.read(root), config)
    samples = SampleSet(
        loaded,
        SamplerConfig(**settings["sampler"]),
        num=num if templates_NL is None else 1,
        seed=settings["sampling_seed"],
        templates_PL=templates_NL,
        lengths_P=lengths_N,
        precision=resolve_weights_dtype(keys.weights_dtype, keys.precision),
    )
    drawn = draw_and_score(samples, domain, metrics=settings["metrics_config"], parts=parts)
    if drawn is None:
        return None
    if lengths_N is not None:  # no number of positions is that of an evaluation
        drawn = dataclasses.replace(drawn, positions=None)
    write_samples(task.samples, drawn, loaded.tokenizer)
    return {"drawn": drawn}
