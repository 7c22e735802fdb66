"""`scmdm study`: prepare, (pre)train, adapt in several arms, sample, evaluate, report. Every part is skipped when it is
done, so the same command goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from scmdm.config.load import load_config, to_yaml
from scmdm.config.prepare import PrepareConfig
from scmdm.config.sampling import EvaluateConfig
from scmdm.config.schema import RunConfig
from scmdm.config.study import StudyConfig
from scmdm.data.manifest import Manifest
from scmdm.data.prepare import prepare
from scmdm.environment import describe_environment
from scmdm.evaluation.evaluate import model_nelbo, molecule_reference
from scmdm.evaluation.molecules import Reference, evaluate_molecules
from scmdm.evaluation.report import print_summary, study_report
from scmdm.files import atomic_write_text
from scmdm.model.weights import LoadedModel, open_model
from scmdm.sampling import generate, load, write_samples
from scmdm.training.checkpoint import find_model, sha256_of_model
from scmdm.training.trainer import run_training

console = Console()


@dataclass(frozen=True)
class Model:
    """A trained model of the study: an arm and the seed it was adapted with."""

    arm: str
    seed: int
    path: Path
    run: Path | None  # None for a base that was not trained here

    @property
    def key(self) -> str:
        return self.arm if self.arm == "base" else f"{self.arm}-{self.seed}"


def run_study(config: StudyConfig) -> Path:
    """Run what is missing and write `report.html`; returns the study directory."""
    started = time.perf_counter()
    out = Path(config.out)
    prepare_config = load_config(PrepareConfig, Path(config.prepare))
    _check_runs(config, out, prepare_config.out)
    out.mkdir(parents=True, exist_ok=True)
    prepare(prepare_config)
    base = _base(config, out, prepare_config.out)
    models = [base, *_adapt(config, out, base, prepare_config.out)]
    evaluations = _evaluate(config, out, models, Path(prepare_config.out))
    study = {
        "title": config.title,
        "config": to_yaml(config),
        "environment": describe_environment(),
        "arms": _describe_arms(config, models, evaluations),
        "evaluations": evaluations,
    }
    atomic_write_text(out / "study.json", json.dumps(study, indent=1) + "\n")
    print_summary(study_report(out, out / "report.html"))
    minutes = (time.perf_counter() - started) / 60
    console.print(f"report: {out / 'report.html'} ({minutes:.1f} minutes)", highlight=False, soft_wrap=True)
    return out


def _check_runs(config: StudyConfig, out: Path, data: str) -> None:
    """Every run's configuration, read before the first one starts: a mistake must not show after an hour."""
    if config.from_scratch:
        _base_config(config, out, data)
    else:
        find_model(Path(config.base))
    for seed in config.adaptation_seeds:
        for arm in config.arms:
            _arm_config(config, out, config.base, data, arm, seed)


def _base(config: StudyConfig, out: Path, data: str) -> Model:
    if not config.from_scratch:
        return Model("base", 0, find_model(Path(config.base)), None)
    run = _base_config(config, out, data)
    run_training(run, None)
    return Model("base", 0, find_model(Path(run.run_dir)), Path(run.run_dir))


def _base_config(config: StudyConfig, out: Path, data: str) -> RunConfig:
    overrides = [f"run_dir={out / 'base'}", f"data.path={data}", *config.base_overrides]
    return load_config(RunConfig, Path(config.base_config), overrides)


def _adapt(config: StudyConfig, out: Path, base: Model, data: str) -> Iterator[Model]:
    for seed in config.adaptation_seeds:
        for arm, settings in config.arms.items():
            console.rule(f"{settings.label}, seed {seed}")
            run = _arm_config(config, out, str(base.path), data, arm, seed)
            run_training(run, open_model(base.path))
            yield Model(arm, seed, find_model(Path(run.run_dir)), Path(run.run_dir))


def _arm_config(config: StudyConfig, out: Path, base: str, data: str, arm: str, seed: int) -> RunConfig:
    overrides = [
        f"run_dir={out / f'{arm}-{seed}'}",
        f"data.path={data}",
        f"base={base}",
        f"seed={seed}",
        f"self_conditioning.rate={config.arms[arm].rate}",
        *config.overrides,
    ]
    return load_config(RunConfig, Path(config.adapt_config), overrides)


def _evaluate(config: StudyConfig, out: Path, models: list[Model], root: Path) -> list[dict[str, Any]]:
    """All evaluations, from their files where they exist."""
    console.rule("sampling")
    reference: Reference | None = None
    rows = []
    data = Manifest.read(root).fingerprint()
    for model in models:
        loaded = load(model.path)
        fingerprint = sha256_of_model(model.path)
        for task in _tasks(config, model, data):
            path = out / "evaluations" / f"{task['name']}.json"
            row = _read_row(path, task, fingerprint)
            if row is None:
                reference = reference or molecule_reference(root, loaded, config.split, fcd=config.fcd)
                row = {**task, "model_sha256": fingerprint, **_measure(config, loaded, task, root, reference, out)}
                path.parent.mkdir(exist_ok=True)
                atomic_write_text(path, json.dumps(row) + "\n")
            rows.append(row)
    return rows


def _tasks(config: StudyConfig, model: Model, data: str) -> Iterator[dict[str, Any]]:
    """What is to be measured, with all that its result depends on."""
    common = {"arm": model.arm, "adaptation_seed": model.seed, "split": config.split, "data_fingerprint": data}
    yield {**common, "name": f"{model.key}_nelbo", "kind": "nelbo", "num": config.nelbo_samples}
    for steps in config.steps:
        for seed in config.sampling_seeds:
            name = f"{model.key}_T{steps}_s{seed}"
            sampler = dataclasses.asdict(dataclasses.replace(config.sampler, steps=steps))
            yield {
                **common,
                "name": name,
                "kind": "samples",
                "steps": steps,
                "sampling_seed": seed,
                "num": config.num,
                "sampler": sampler,
                "fcd": config.fcd,
            }


def _read_row(path: Path, task: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """A finished evaluation, if it is of this very model and task."""
    if not path.is_file():
        return None
    row: dict[str, Any] = json.loads(path.read_text())
    same = row.get("model_sha256") == fingerprint and all(row.get(key) == value for key, value in task.items())
    return row if same else None


def _measure(
    config: StudyConfig, loaded: LoadedModel, task: dict[str, Any], root: Path, reference: Reference, out: Path
) -> dict[str, Any]:
    if task["kind"] == "nelbo":
        found = model_nelbo(loaded, root, EvaluateConfig(split=config.split, nelbo_samples=config.nelbo_samples))
        return {"nelbo": {mode: dataclasses.asdict(value) for mode, value in found.items()}}
    sampler = dataclasses.replace(config.sampler, steps=task["steps"])
    drawn = generate(loaded, sampler, num=config.num, seed=task["sampling_seed"], progress=True)
    samples = Path("samples") / f"{task['name']}.jsonl"
    write_samples(out / samples, drawn)
    metrics = evaluate_molecules(drawn.texts, drawn.framed, reference).as_dict()
    valid = f"{metrics['num_valid']}/{config.num} valid"
    console.print(
        f"{task['name']:<24} {valid}, {drawn.evaluations} evaluations, {drawn.seconds:.1f} s", highlight=False
    )
    return {
        "evaluations": drawn.evaluations,
        "seconds": drawn.seconds,
        "metrics": metrics,
        "samples_file": str(samples),
    }


def _describe_arms(config: StudyConfig, models: list[Model], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    arms = []
    for name in dict.fromkeys(model.arm for model in models):
        own = [model for model in models if model.arm == name]
        nelbo = [row["nelbo"] for row in evaluations if row["arm"] == name and row["kind"] == "nelbo"]
        arms.append(
            {
                "name": name,
                "label": "base" if name == "base" else config.arms[name].label,
                "rate": 0.0 if name == "base" else config.arms[name].rate,
                "runs": [str(model.run.relative_to(config.out)) for model in own if model.run is not None],
                "nelbo": nelbo,
                "cost": [_cost(model.path) for model in own if model.run is not None],
            }
        )
    return arms


def _cost(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / "state.json").read_text())
    batch = yaml.safe_load((checkpoint / "config.yaml").read_text())["train"]["global_batch_size"]
    cost = {key: state[key] for key in ("step", "tokens", "seconds", "evaluations")}
    return {**cost, "sequences": state["step"] * batch}
