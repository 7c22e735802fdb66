"""`scmdm report` of a study: a self-contained HTML file, and its figures as PNG files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from scmdm.config.study import DISTRIBUTIONS, HELD_OUT
from scmdm.data.tokenizers import load_tokenizer
from scmdm.domains.domain_registry import load_domain, main_metric
from scmdm.domains.interface import Domain, Metric
from scmdm.domains.plotting import COLOURS
from scmdm.evaluation.comparison import (
    Json,
    QualityByArm,
    QualityByMetric,
    compare_arms,
    conclusions,
    describe_protocol,
    missing_values,
    quality_by_arm,
    reference_arm,
)
from scmdm.evaluation.frontier import compare_at_equal_diversity, equal_diversity_table, model_of_arm
from scmdm.evaluation.html import bullets, heading, page, paragraph, picture, preformatted, table
from scmdm.evaluation.report_figures import (
    Panel,
    arms_figure,
    frontier_figure,
    length_figure,
    loss_figure,
    quality_figure,
)
from scmdm.evaluation.study_record import STUDY_FILE, OpenStudy, open_study
from scmdm.evaluation.study_tables import TextTable, benchmark_table, cost_table, quality_table, trainings_table
from scmdm.observability.run_metrics import read_metrics
from scmdm.system.files import atomic_write_text
from scmdm.system.run_directory import METRICS_FILE
from scmdm.system.terminal import Terminal
from scmdm.system.untrusted import reading

_MARKS = "bars are 95 % intervals over samples, crosses single trainings where there are several"
_SHOWN_TEXTS, _SHOWN_CHARACTERS = 3, 600


@dataclass(frozen=True)
class StudySummary:
    """Tables and conclusions of a study, as text."""

    title: str
    protocol: str
    quality: TextTable
    figure_metrics: TextTable  # the columns of `quality` whose metrics are in the figures
    trainings: TextTable  # without rows if each arm was trained once
    equal_diversity: TextTable  # without rows if no model was sampled in several ways
    benchmarks: dict[str, TextTable]  # by name of the benchmark
    cost: TextTable
    conclusions: list[str]
    problems: list[str]  # what was left out


def study_report(directory: Path, out: Path) -> StudySummary:
    """Write the report of the study in `directory` to `out`, and its figures beside it; returns the summary.

    Damaged rows of evaluations, metrics and samples are left out, and named in the report and in the summary. Raises
    UserError if `study.json` cannot be read.
    """
    study = open_study(directory)
    with reading(directory / STUDY_FILE, "record of a study", "run the study again"):
        return _write_report(study, out)


def _write_report(study: OpenStudy, out: Path) -> StudySummary:
    record, samples, arms = study.record, study.samples, study.arms
    domain = load_domain(record.domain)
    labels = {arm["name"]: arm["label"] for arm in arms}
    values = {metric.name: quality_by_arm(samples, labels, metric.name) for metric in domain.metrics}
    shown = [metric for metric in domain.metrics if any(values[metric.name].values())]
    reference = reference_arm(arms, record.reference)
    main = main_metric(domain, record.metric)
    if main not in shown:
        study.problems.append(f"metric={main.name} has no value in any arm: see the keys of metrics that it needs")
    summary = _summarize(study, main, shown, values, labels)
    figures = out.parent
    parts = [
        bullets(summary.conclusions),
        paragraph(summary.protocol),
        heading("Results"),
        *_quality_pictures(_panels(shown, values, ""), samples, labels, reference["label"], figures),
        *_length_picture(main, arms, values[main.name], figures / "length.png"),
        *_frontier_picture(shown, arms, values, figures / "frontier.png"),
        *_titled_table("At equal diversity", summary.equal_diversity),
        *_titled_table("Metrics", summary.quality),
        *_titled_table("Trainings", summary.trainings),
        *(
            part
            for name, benchmark in summary.benchmarks.items()
            for part in (
                heading(name),
                *_benchmark_picture(_panels(shown, values, name), labels, figures / f"{name.split()[0].lower()}.png"),
                table(*benchmark, group=True),
            )
        ),
        heading("Cost"),
        table(*summary.cost),
        paragraph(
            "A conditioned training step makes two denoiser evaluations, the first without gradients. Sampling with "
            "self-conditioning makes no additional evaluations.",
            note=True,
        ),
        *_study_curves(study, figures / "losses.png"),
        *_domain_pictures(study, domain, figures),
        heading("Configuration"),
        preformatted(record.config),
        preformatted(json.dumps(record.environment, indent=2)),
    ]
    if study.problems:  # the parts above read files, too
        parts.insert(0, bullets(study.problems))
    atomic_write_text(out, page(record.title, parts))
    return summary


def _titled_table(title: str, found: TextTable) -> list[str]:
    return [heading(title), table(*found, group=True)] if found[1] else []


def _summarize(
    study: OpenStudy,
    main: Metric,
    shown: Sequence[Metric],
    values: QualityByMetric,
    labels: Mapping[str, str],
) -> StudySummary:
    samples, arms = study.samples, study.arms
    own = [metric for metric in shown if not metric.benchmark]
    reference = reference_arm(arms, study.record.reference)
    axes = {metric.frontier: metric for metric in shown if metric.frontier}
    x = axes.get("x") if main.frontier == "y" else None
    # Models are compared by their own arms; other ways to sample them, as at other temperatures, at equal diversity.
    models = arms if x is None else [arm for arm in arms if arm is reference or model_of_arm(arm) == arm["name"]]
    found, impossible = compare_arms(samples, models, reference, main)
    study.problems.extend([*missing_values(samples, labels, shown), *impossible])
    benchmarks = {
        name: benchmark_table(values, [metric for metric in shown if metric.benchmark == name], labels, samples)
        for name in dict.fromkeys(metric.benchmark for metric in shown if metric.benchmark)
    }
    return StudySummary(
        study.record.title,
        describe_protocol(samples, arms, found, study.further_evaluations()),
        quality_table(values, own, labels, samples),
        quality_table(values, [metric for metric in own if metric.in_figure], labels, samples),
        trainings_table(values[main.name], main),
        _equal_diversity(study, reference, axes),
        benchmarks,
        cost_table(arms, samples),
        conclusions(found, main, None if x is None else (x, compare_arms(samples, models, reference, x)[0])),
        study.problems,
    )


def _equal_diversity(study: OpenStudy, reference: Json, axes: Mapping[str, Metric]) -> TextTable:
    if len(axes) < 2:
        return [], []
    found = compare_at_equal_diversity(study.samples, study.arms, reference, axes["y"], axes["x"])
    return equal_diversity_table(found, axes["y"], axes["x"])


def _panels(shown: Sequence[Metric], values: QualityByMetric, benchmark: str) -> list[Panel]:
    return [
        Panel(m.title, values[m.name], m.better, m.scale, m.reference, m.maximum)
        for m in shown
        if m.in_figure and m.benchmark == benchmark
    ]


def _quality_pictures(
    panels: Sequence[Panel], samples: Sequence[Json], labels: Mapping[str, str], reference: str, figures: Path
) -> list[str]:
    """Draw metrics against T, unless many arms have one T alone; with many arms, also draw one row per arm."""
    parts: list[str] = []
    if not panels:
        return parts
    steps = {row["steps"] for row in samples}
    if len(labels) <= len(COLOURS) or len(steps) > 1:
        quality = quality_figure(panels, figures / "quality.png")
        parts.append(picture(quality, f"Metrics against the number of sampling steps T; {_MARKS}."))
    if len(labels) > len(COLOURS):
        order = [reference, *(label for label in labels.values() if label != reference)]
        rows = [replace(p, values={label: p.values[label] for label in order if label in p.values}) for p in panels]
        compared = arms_figure(rows, _picture_steps(samples), figures / "arms.png")
        parts.append(picture(compared, f"All models; {_MARKS}; the dashed line is {reference}."))
    return parts


def _length_picture(metric: Metric, arms: Sequence[Json], values: QualityByArm, path: Path) -> list[str]:
    """Draw quality against tokens where adaptations differ in nothing but their rate and their tokens."""
    base = next((arm for arm in arms if arm["name"] == "base"), None)
    lines: dict[str, dict[int, str]] = {}
    for arm in arms:
        if arm is base or arm.get("samples_of") or arm.get("from_scratch") or not arm["cost"]:
            continue
        points = lines.setdefault(f"rate {arm['rate']:g}", {} if base is None else {0: base["label"]})
        tokens = arm["cost"][0]["tokens"]
        if tokens in points:
            return []
        points[tokens] = arm["label"]
    if not any(values.values()) or not any(len(set(points) - {0}) > 1 for points in lines.values()):
        return []
    panel = Panel(metric.title, values, metric.better, metric.scale)
    caption = f"{metric.title} against the tokens of the adaptation, from the base on; {_MARKS.split(',')[0]}."
    return [picture(length_figure(panel, lines, path), caption)]


def _frontier_picture(
    shown: Sequence[Metric], arms: Sequence[Mapping[str, Any]], values: QualityByMetric, path: Path
) -> list[str]:
    """Draw quality against diversity where a model is sampled in several ways, as at several temperatures."""
    lines: dict[str, dict[str, str]] = {}
    labels = {arm["name"]: arm["label"] for arm in arms}
    for arm in arms:
        drawn = "" if arm["name"] == (model := model_of_arm(arm)) else ", ".join(arm["sampler"])
        lines.setdefault(labels[model], {})[arm["label"]] = drawn.removeprefix("temperature=")
    axes = {m.frontier: Panel(m.title, values[m.name], m.better, m.scale) for m in shown if m.frontier}
    if len(axes) < 2 or max(map(len, lines.values())) < 2 or len(lines) > len(COLOURS):
        return []
    x, y = axes["x"], axes["y"]
    caption = (
        f"{y.title} against {x.title}; a line joins the ways in which a model is sampled, a number beside a point is a "
        f"temperature; {_MARKS.split(',')[0]}."
    )
    return [picture(frontier_figure(x, y, lines, path), caption)]


def _benchmark_picture(panels: Sequence[Panel], labels: Mapping[str, str], path: Path) -> list[str]:
    if not panels or len(labels) > len(COLOURS):
        return []
    caption = f"Metrics against the number of sampling steps T; {_MARKS}; the dotted line is real data."
    return [picture(quality_figure(panels, path), caption)]


def print_summary(summary: StudySummary) -> None:
    """Print the conclusions of a study, then its tables, with the metrics of the figures alone."""
    console = Terminal()
    width = None if console.is_terminal else 160
    console = Terminal(width=width)
    _print_list(console, summary.conclusions)
    some = {"Trainings": summary.trainings, "At equal diversity": summary.equal_diversity}
    some = {title: found for title, found in some.items() if found[1]}
    tables = {summary.title: summary.figure_metrics, **some, **summary.benchmarks, "Cost": summary.cost}
    for title, (header, rows) in tables.items():
        shown = Table(title=title)
        for index, name in enumerate(header):
            shown.add_column(name, justify="left" if index == 0 or name in ("model", "metric") else "right")
        previous = None
        for row in rows:
            if previous not in (None, row[0]) and title != "Cost":
                shown.add_section()
            previous = row[0]
            shown.add_row(*row)
        console.print(shown)
    _print_list(console, [summary.protocol, *summary.problems])


def _print_list(console: Terminal, statements: Sequence[str]) -> None:
    for statement in statements:
        console.print(f"- {statement}")


def _study_curves(study: OpenStudy, path: Path) -> list[str]:
    """Draw the arms' loss curves unless there are more arms than colours; each run also has its own report."""
    arms = study.arms
    if len(arms) > len(COLOURS):
        return []
    train: dict[str, list[dict[str, Any]]] = {}
    validation: dict[str, list[dict[str, Any]]] = {}
    adapted = [arm for arm in arms if arm["name"] != "base" and arm["runs"]]
    for arm in adapted:
        rows = read_metrics(study.file(arm["runs"][0]) / METRICS_FILE)
        study.note(rows)
        train[arm["label"]] = [row for row in rows if row["kind"] == "train"]
        validation[arm["label"]] = [row for row in rows if row["kind"] == "validation"]
    # List all arms, so that the base keeps the first colour even without a curve.
    loss_figure(train, validation, path, order=[arm["label"] for arm in arms])
    caption = "Training loss and validation NELBO of the arms, without (null) and with self-conditioning (conditioned)."
    return [heading("Losses"), picture(path, caption)]


def _domain_pictures(study: OpenStudy, domain: type[Domain], out: Path) -> list[str]:
    """Draw samples of the first sampling seed, and compare their distributions with held-out data."""
    tokenizer = load_tokenizer(study.file(study.record.tokenizer))
    parts = []
    samples, arms = study.samples, study.arms
    steps, reference = _picture_steps(samples), reference_arm(arms, study.record.reference)
    few = arms if len(arms) <= len(COLOURS) else [arm for arm in arms if arm in (arms[0], reference)]
    for arm in few:
        own = [row for row in samples if row["arm"] == arm["name"] and row["steps"] == steps]
        drawn = study.read_samples(own[0]["samples_file"]) if own else []
        if drawn:
            path = out / f"{domain.name}_{arm['name']}.png"
            caption = domain.draw(drawn, tokenizer, path)
            if caption is not None:
                parts.append(picture(path, f"{arm['label']}, T = {steps}: {caption} of the first seed, unselected."))
            else:
                parts += _first_texts(drawn, f"{arm['label']}, T = {steps}")
    compared = _distribution_picture(study, domain, out / f"{domain.name}_{DISTRIBUTIONS}.png")
    return [heading(domain.name.capitalize()), *compared, *parts] if compared or parts else []


def _first_texts(samples: Sequence[Json], title: str) -> list[str]:
    texts = [sample["text"][:_SHOWN_CHARACTERS] for sample in samples[:_SHOWN_TEXTS]]
    shown = f"{title}: the first {len(texts)} samples of the first seed, cut to {_SHOWN_CHARACTERS} characters."
    return [paragraph(shown, note=True), preformatted("\n\n".join(texts))]


def _distribution_picture(study: OpenStudy, domain: type[Domain], path: Path) -> list[str]:
    """Draw distributions of samples of each arm at one T, of one training as for the base, and of held-out data."""
    steps = _picture_steps(study.samples)
    sets = {HELD_OUT: study.read_samples(study.record.held_out)}
    for arm in study.arms:
        own = [row for row in study.samples if row["arm"] == arm["name"] and row["steps"] == steps]
        files = [r["samples_file"] for r in own if r["adaptation_seed"] == own[0]["adaptation_seed"]]
        if files:
            sets[arm["label"]] = [sample for file in files for sample in study.read_samples(file)]
    if not all(sets.values()):
        return []
    caption = domain.compare(sets, path)
    return (
        [picture(path, f"T = {steps}, first training, all sampling seeds: {caption}.")] if caption is not None else []
    )


def _picture_steps(samples: Sequence[Json]) -> int:
    """T of the figures: 32, as in the published protocol, if it was sampled, otherwise the largest."""
    steps = sorted({row["steps"] for row in samples})
    return 32 if 32 in steps else steps[-1]
