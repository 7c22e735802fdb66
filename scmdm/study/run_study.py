"""`scmdm study`: prepare data, train a base, adapt it in several arms, sample, evaluate, report.

Finished parts are skipped, so the same command continues an interrupted study. In one process, training and sampling
are jobs of worker processes, one per core. Under torchrun the ranks share every job.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from scmdm.checkpoint.reader import read_state
from scmdm.config.loading import load_config, to_yaml
from scmdm.config.preparation import PrepareConfig
from scmdm.config.stored import read_stored_config
from scmdm.config.study import ArmConfig, StudyConfig
from scmdm.data.manifest import Manifest
from scmdm.data.preparation.prepare import prepare
from scmdm.domains.domain_registry import domain_of, load_domain, main_metric, metrics_config
from scmdm.domains.interface import decode_split
from scmdm.evaluation.study_record import STUDY_FILE, TrainingCost
from scmdm.evaluation.study_report import print_summary, study_report
from scmdm.observability.environment import describe_environment
from scmdm.sampling.model_loading import evaluation_ranks
from scmdm.study.study_jobs import StudyJobs
from scmdm.study.study_plan import StudyModel, StudyPlan
from scmdm.study.study_ranks import RANKS, RankedStudyJobs
from scmdm.system.files import atomic_write_bytes, atomic_write_text, json_text
from scmdm.system.process_group import current_world, on_rank_0
from scmdm.system.terminal import Terminal

_MAX_HELD_OUT = 4096  # held-out sequences that are kept for the report's figures


def run_study(config: StudyConfig) -> Path:
    """Run the missing parts of a study and write `study.json` and `report.html`; returns the study directory.

    Raises UserError before anything is trained if a run's configuration, the split or a key of `metrics` is not
    possible.
    """
    started, ranks = time.perf_counter(), current_world().size
    console = Terminal()
    config = config.selected()
    prepare_config = load_config(PrepareConfig, Path(config.prepare))
    plan = StudyPlan(config, Path(config.out), Path(prepare_config.out))
    with evaluation_ranks(RANKS):
        on_rank_0(lambda: _open(plan, prepare_config, ranks))
        manifest = Manifest.read(plan.data)
        manifest.split(config.split, plan.data)
        if not manifest.has_prompts:  # with prompts, samples may be shorter
            plan.check_samplers(manifest.length)
        domain = domain_of(manifest)
        metrics = metrics_config(domain, config.metrics)
        main_metric(load_domain(domain), config.metric)
    make = RankedStudyJobs if ranks > 1 else StudyJobs
    models, evaluations = make(plan, domain, metrics, console).run()
    with evaluation_ranks(RANKS):
        on_rank_0(lambda: _write(plan, manifest, models, evaluations))
        if current_world().is_main:
            minutes = (time.perf_counter() - started) / 60
            console.print(f"report: {plan.out / 'report.html'} ({minutes:.1f} minutes)", soft_wrap=True)
    return plan.out


def _open(plan: StudyPlan, prepare_config: PrepareConfig, ranks: int) -> None:
    """Check the configurations of all runs, and prepare the data."""
    plan.check(ranks)
    plan.out.mkdir(parents=True, exist_ok=True)
    prepare(prepare_config)


def _write(plan: StudyPlan, manifest: Manifest, models: list[StudyModel], evaluations: list[dict[str, Any]]) -> None:
    """Write `study.json` and the report, and print its summary."""
    config, out, tokenizer = plan.config, plan.out, manifest.tokenizer.file
    atomic_write_bytes(out / tokenizer, (plan.data / tokenizer).read_bytes())
    study = {
        "title": config.title,
        "domain": domain_of(manifest),
        "tokenizer": tokenizer,
        "held_out": _write_held_out(plan.data, manifest, config.split, out),
        "config": to_yaml(config),
        "environment": describe_environment(),
        "reference": config.reference,
        "metric": config.metric,
        "arms": _describe_arms(config, models, evaluations),
        "evaluations": evaluations,
    }
    atomic_write_text(out / STUDY_FILE, json_text(study, indent=1))
    print_summary(study_report(out, out / "report.html"))


def _write_held_out(root: Path, manifest: Manifest, split: str, out: Path) -> str:
    """Write held-out sequences, evenly spaced over the split, for the report's figures; returns the file's name."""
    texts = decode_split(root, manifest, split)
    chosen = np.linspace(0, len(texts) - 1, min(len(texts), _MAX_HELD_OUT), dtype=np.int64)
    name = f"held_out_{split}.jsonl"
    atomic_write_text(out / name, "".join(json.dumps({"text": texts[i], "framed": True}) + "\n" for i in chosen))
    return name


def _describe_arms(
    config: StudyConfig, models: list[StudyModel], evaluations: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Describe the arms for `study.json`, the base first."""
    arms = []
    for name in dict.fromkeys(model.arm for model in models):
        own = [model for model in models if model.arm == name]
        nelbo = [row["nelbo"] for row in evaluations if row["arm"] == name and row["kind"] == "nelbo"]
        arm = ArmConfig(label="base") if name == "base" else config.arms[name]
        source = own[0].arm if arm.samples_of is None else arm.samples_of
        stored = read_stored_config(own[0].path) if source != "base" else None
        arms.append(
            {
                "name": name,
                "label": arm.label,
                "rate": 0.0 if stored is None else stored.need("self_conditioning.rate", float),
                "from_scratch": arm.from_scratch,
                "samples_of": arm.samples_of,
                "sampler": list(arm.sampler),
                "runs": [str(model.run.relative_to(config.out)) for model in own if model.run is not None],
                "nelbo": nelbo,
                "cost": [_training_cost(model.path) for model in own if model.run is not None],
            }
        )
    return arms


def _training_cost(checkpoint: Path) -> dict[str, Any]:
    state = read_state(checkpoint)
    batch = read_stored_config(checkpoint).need("train.global_batch_size", int)
    cost = TrainingCost(state.step, state.tokens, state.seconds, state.evaluations, state.step * batch)
    return dataclasses.asdict(cost)
