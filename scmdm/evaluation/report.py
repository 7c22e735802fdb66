"""`scmdm report`: one self-contained HTML file, and its PNGs beside it, for a run or a study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scmdm.data.tokenizers import load_tokenizer
from scmdm.domains.registry import DOMAINS
from scmdm.errors import UserError
from scmdm.evaluation.comparison import (
    Json,
    cost_table,
    intervals_by_arm,
    protocol,
    protocol_table,
    quality_table,
    reference_arm,
    statements,
)
from scmdm.evaluation.figures import COLOURS, Panel, arms_figure, loss_figure, progress_figure, quality_figure
from scmdm.evaluation.html import bullets, heading, page, paragraph, picture, preformatted, table
from scmdm.evaluation.statistics import mean_interval
from scmdm.observability.metrics import format_duration, read_metrics
from scmdm.runtime.status import planned_steps
from scmdm.system.files import atomic_write_text

_SHOWN_TEXTS, _SHOWN_LETTERS = 3, 600
_DESCRIPTIONS = ("config.yaml", "environment.json")


@dataclass(frozen=True)
class StudySummary:
    """The study's table and its conclusions, as text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    protocols: dict[str, tuple[list[str], list[list[str]]]]  # header and rows of each benchmark
    cost_header: list[str]
    cost_rows: list[list[str]]
    statements: list[str]


def study_report(directory: Path, out: Path) -> StudySummary:
    """Write `out` and the figures beside it from `study.json`; returns what is to be printed."""
    study = _read_json(directory / "study.json")
    labels = {arm["name"]: arm["label"] for arm in study["arms"]}
    samples = [row for row in study["evaluations"] if row["kind"] == "samples"]
    domain = DOMAINS[study["domain"]]
    values = {metric.name: intervals_by_arm(samples, labels, metric.name) for metric in domain.metrics}
    shown = [metric for metric in domain.metrics if any(values[metric.name].values())]
    own = [metric for metric in shown if not metric.protocol]
    header, rows = quality_table(values, own, labels, samples)
    protocols = {
        name: protocol_table(values, [metric for metric in shown if metric.protocol == name], labels, samples)
        for name in dict.fromkeys(metric.protocol for metric in shown if metric.protocol)
    }
    cost_header, cost_rows = cost_table(study["arms"], samples)
    reference = reference_arm(study)
    concluded = statements(samples, study["arms"], reference, domain.metrics[0])
    summary = StudySummary(study["title"], header, rows, protocols, cost_header, cost_rows, concluded)
    figures = out.parent
    panels = {
        name: [
            Panel(m.title, values[m.name], m.better, m.scale, m.reference, m.most)
            for m in shown
            if m.in_figure and m.protocol == name
        ]
        for name in ("", *protocols)
    }
    parts = [
        paragraph(protocol(samples, study["arms"])),
        heading("What came out"),
        bullets(summary.statements),
        *_quality_pictures(panels[""], samples, labels, reference["label"], figures),
        table(header, rows, group=True),
        *(
            part
            for name, (columns, lines) in protocols.items()
            for part in (
                heading(name),
                *_protocol_picture(panels[name], labels, figures / f"{name.split()[0].lower()}.png"),
                table(columns, lines, group=True),
            )
        ),
        heading("Cost"),
        table(cost_header, cost_rows),
        paragraph(
            "A conditioned step makes two denoiser evaluations, the first without gradients; sampling makes none more.",
            note=True,
        ),
        *_study_curves(directory, study["arms"], figures / "losses.png"),
        *_pictures(directory, study, samples, figures),
        heading("How it was made"),
        preformatted(study["config"]),
        preformatted(json.dumps(study["environment"], indent=2)),
    ]
    atomic_write_text(out, page(study["title"], parts))
    return summary


def _quality_pictures(
    panels: Sequence[Panel], samples: Sequence[Json], labels: Mapping[str, str], reference: str, figures: Path
) -> list[str]:
    """Against T; and more models than there are colours a row each, the reference first."""
    parts = []
    steps = {row["steps"] for row in samples}
    if len(labels) <= len(COLOURS) or len(steps) > 1:
        quality = quality_figure(panels, figures / "quality.png")
        parts.append(picture(quality, "Quality against denoiser evaluations; bars are 95 % intervals over seeds."))
    if len(labels) > len(COLOURS):
        order = [reference, *(label for label in labels.values() if label != reference)]
        rows = [replace(p, values={label: p.values[label] for label in order if label in p.values}) for p in panels]
        compared = arms_figure(rows, _picture_steps(samples), figures / "arms.png")
        parts.append(
            picture(compared, f"All models; bars are 95 % intervals over seeds, the dashed line is {reference}.")
        )
    return parts


def _protocol_picture(panels: Sequence[Panel], labels: Mapping[str, str], path: Path) -> list[str]:
    """Against T, of no more models than there are colours."""
    if not panels or len(labels) > len(COLOURS):
        return []
    caption = "Against denoiser evaluations; bars are 95 % intervals over seeds, the dotted line is real data."
    return [picture(quality_figure(panels, path), caption)]


def print_summary(summary: StudySummary) -> None:
    """The tables and statements on the terminal."""
    console = Console()
    width = None if console.is_terminal else 160
    console = Console(width=width)
    for title, header, rows in (
        (summary.title, summary.header, summary.rows),
        *((name, *content) for name, content in summary.protocols.items()),
        ("Cost", summary.cost_header, summary.cost_rows),
    ):
        shown = Table(title=title)
        for index, name in enumerate(header):
            shown.add_column(name, justify="left" if index == 0 or name in ("model", "measure") else "right")
        before = None
        for row in rows:
            if before not in (None, row[0]) and title != "Cost":
                shown.add_section()
            before = row[0]
            shown.add_row(*row)
        console.print(shown)
    for statement in summary.statements:
        console.print(f"- {statement}", highlight=False)


def _study_curves(directory: Path, arms: Sequence[Json], path: Path) -> list[str]:
    """Of no more arms than there are colours: more would hide each other, and each run has its own report."""
    if len(arms) > len(COLOURS):
        return []
    train: dict[str, list[dict[str, Any]]] = {}
    validation: dict[str, list[dict[str, Any]]] = {}
    adapted = [arm for arm in arms if arm["name"] != "base" and arm["runs"]]
    for arm in adapted:
        rows = read_metrics(directory / arm["runs"][0] / "metrics.jsonl")
        train[arm["label"]] = [row for row in rows if row["kind"] == "train"]
        validation[arm["label"]] = [row for row in rows if row["kind"] == "validation"]
    # The base has the first colour everywhere, with or without curves.
    loss_figure(train, validation, path, order=[arm["label"] for arm in arms])
    caption = "Training loss and validation NELBO of the arms. Null: without an estimate; conditioned: with one."
    return [heading("Losses"), picture(path, caption)]


def _pictures(directory: Path, study: Json, samples: Sequence[Json], out: Path) -> list[str]:
    domain, tokenizer = DOMAINS[study["domain"]], load_tokenizer(directory / study["tokenizer"])
    parts = []
    steps, arms = _picture_steps(samples), study["arms"]
    few = arms if len(arms) <= len(COLOURS) else [arm for arm in arms if arm in (arms[0], reference_arm(study))]
    for arm in few:
        own = [row for row in samples if row["arm"] == arm["name"] and row["steps"] == steps]
        if own:
            path = out / f"{domain.name}_{arm['name']}.png"
            caption = domain.draw(_read_samples(directory / own[0]["samples_file"]), tokenizer, path)
            if caption is not None:
                parts.append(picture(path, f"{arm['label']}, T = {steps}: {caption} of seed 0, not chosen."))
            else:
                parts += _first_texts(own[0], directory, f"{arm['label']}, T = {steps}")
    compared = _comparison(directory, study, samples, out / f"{domain.name}_distributions.png")
    return [heading(domain.name.capitalize()), *compared, *parts] if compared or parts else []


def _first_texts(row: Json, directory: Path, title: str) -> list[str]:
    first = _read_samples(directory / row["samples_file"])[:_SHOWN_TEXTS]
    texts = [sample["text"][:_SHOWN_LETTERS] for sample in first]
    shown = f"{title}: the first {len(texts)} samples of seed 0, not chosen, {_SHOWN_LETTERS} letters at most of each."
    return [paragraph(shown, note=True), preformatted("\n\n".join(texts))]


def _comparison(directory: Path, study: Json, samples: Sequence[Json], path: Path) -> list[str]:
    """Distributions of all samples of each arm at one T beside those of held-out data."""
    steps = _picture_steps(samples)
    sets = {"held out": _read_samples(directory / study["held_out"])}
    for arm in study["arms"]:
        files = [r["samples_file"] for r in samples if r["arm"] == arm["name"] and r["steps"] == steps]
        if files:
            sets[arm["label"]] = [sample for file in files for sample in _read_samples(directory / file)]
    caption = DOMAINS[study["domain"]].compare(sets, path)
    return [picture(path, f"T = {steps}, all seeds: {caption}.")] if caption is not None else []


def _picture_steps(samples: Sequence[Json]) -> int:
    """32, the published protocol, or the nearest below the largest."""
    steps = sorted({row["steps"] for row in samples})
    return 32 if 32 in steps else steps[-1]


def _read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_report(directory: Path, out: Path) -> Path:
    """Write `out` for one run, finished or not: curves, evaluations, configuration."""
    rows = read_metrics(directory / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    if not train:
        raise UserError(f"{directory} has no training step in metrics.jsonl yet; wait for train.log_every steps")
    name = directory.resolve().name
    last = train[-1]
    figures = out.parent
    losses = loss_figure({name: train}, {name: validation}, figures / "losses.png", order=[name])
    progress = progress_figure(train, figures / "progress.png")
    parts = [
        paragraph(
            f"Step {last['step']:,}{_of_steps(directory)}, {last['tokens']:,} tokens, "
            f"{format_duration(last['seconds'])} of training, loss {last['loss']:.4f}."
        ),
        picture(losses, "Training loss and validation NELBO."),
        picture(progress, "Learning rate, gradient norm and speed."),
        *_run_evaluations(directory),
        heading("Configuration"),
        *(preformatted((directory / name).read_text()) for name in _DESCRIPTIONS if (directory / name).exists()),
    ]
    atomic_write_text(out, page(f"Run {name}", parts))
    return out


def _of_steps(directory: Path) -> str:
    """What a run is to reach; nothing when it does not say so."""
    steps = planned_steps(directory)
    return f" of {steps:,}" if steps is not None else ""


def _run_evaluations(directory: Path) -> list[str]:
    parts = []
    for path in sorted((directory / "evaluations").glob("*.json")):
        result = _read_json(path)
        rows = [
            [f"NELBO {mode}", f"{v['mean']:.4f} ± {v['stderr']:.4f}"] for mode, v in result.get("nelbo", {}).items()
        ]
        numbers = [entry["metrics"] for entry in result.get("samples", [])]
        names = [key for key in (numbers[0] if numbers else {}) if isinstance(numbers[0][key], int | float)]
        whole = [key for key in names if all(isinstance(n[key], int | float) for n in numbers)]
        rows += [[key.replace("_", " "), mean_interval([n[key] for n in numbers]).text(4)] for key in whole]
        parts += [heading(f"Evaluation {path.stem} (step {result['step']:,})"), table(["measure", "value"], rows)]
    return parts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the study or the evaluation again") from error
