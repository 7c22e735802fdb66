"""Figures of a run and of a study, as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from scmdm.domains.plotting import COLOURS, MARKERS, STYLE, save_figure
from scmdm.evaluation.comparison import Quality, QualityByArm
from scmdm.evaluation.significance import Estimate

Row = Mapping[str, float]
_LINES = ("-", "--", ":")
_SINGLE: Any = {"alpha": 0.7, "markersize": 5}  # marks of single trainings


@dataclass(frozen=True)
class Panel:
    """One metric against the number of sampling steps T."""

    title: str
    values: QualityByArm
    better: str  # "higher", "lower", or "" without a preferred direction
    scale: float = 1.0
    reference: float | None = None  # value of real data, drawn as a dotted line
    maximum: float | None = None  # largest possible value

    @property
    def marked_title(self) -> str:
        """Title with an arrow in the preferred direction, if there is one."""
        arrow = {"higher": " (↑)", "lower": " (↓)"}.get(self.better, "")
        return f"{self.title}{arrow}"


def quality_figure(panels: Sequence[Panel], path: Path) -> Path:
    """Draw metrics against the number of sampling steps; error bars are 95 % intervals over samples.

    An arm without a value of one metric keeps its colour in the plots of the others.
    """
    arms = list(dict.fromkeys(arm for panel in panels for arm in panel.values))
    with plt.rc_context(STYLE):
        figure, axes = _plots(len(panels))
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, arms)
        _legend_below(figure, axes)
        return save_figure(figure, path)


def _plots(count: int) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` plots, up to three in a row."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.8 * rows), squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """Put a common legend below all axes, in as many columns as the figure's width has room for."""
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=columns)
        extent = legend.get_window_extent()
        if extent.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.tight_layout(rect=(0, extent.height / figure.bbox.height, 1, 1))


def _style(index: int) -> dict[str, Any]:
    """Colour and marker of an arm; where colours repeat, the line is another one."""
    line = _LINES[index // len(COLOURS) % len(_LINES)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "ls": line}


def _draw_panel(ax: Axes, panel: Panel, arms: Sequence[str]) -> None:
    ticks = sorted({steps for by_steps in panel.values.values() for steps in by_steps})
    for index, arm in enumerate(arms):
        steps = sorted(panel.values.get(arm, ()))
        if not steps:
            continue
        # Shift by a few per cent, so that error bars of different arms do not overlap.
        x = np.array(steps) * 1.035 ** (index - (len(arms) - 1) / 2)
        found = [panel.values[arm][t] for t in steps]
        y = [quality.estimate.value * panel.scale for quality in found]
        ax.errorbar(
            x,
            y,
            yerr=np.transpose([_error(quality.estimate, panel.scale) for quality in found]),
            label=arm,
            capsize=3,
            markersize=5,
            lw=1.6,
            **_style(index),
        )
        for place, quality in zip(x, found, strict=True):
            trainings = _trainings(quality, panel.scale)
            ax.plot([place] * len(trainings), trainings, "x", color=COLOURS[index % len(COLOURS)], **_SINGLE)
    if panel.reference is not None:
        ax.axhline(panel.reference * panel.scale, color=COLOURS[0], ls=":", lw=1.2)
    _limit(ax, panel)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(tick) for tick in ticks])
    ax.set_xlabel("sampling steps T")
    ax.set_title(panel.marked_title)


def _error(estimate: Estimate, scale: float) -> tuple[float, float]:
    """Lengths of an error bar below and above the value; NaN, which is not drawn, without an interval."""
    return scale * (estimate.value - estimate.low), scale * (estimate.high - estimate.value)


def _trainings(quality: Quality, scale: float) -> list[float]:
    """Values of single trainings, if there are several."""
    values = quality.trainings.values
    return [scale * value for value in values] if len(values) > 1 else []


def _limit(ax: Axes, panel: Panel) -> None:
    """Clip the axis to possible values: an interval over few samples can reach beyond them."""
    low, high = ax.get_ylim()
    means = [quality.estimate.value for by_steps in panel.values.values() for quality in by_steps.values()]
    maximum = np.inf if panel.maximum is None else panel.maximum * panel.scale
    if min(means) >= 0:
        high = min(high, 1.05 * maximum)
        ax.set_ylim(max(low, -0.05 * high), high)


def frontier_figure(x: Panel, y: Panel, lines: Mapping[str, Mapping[str, str]], path: Path) -> Path:
    """Draw metric `y` against metric `x`, one plot per T.

    `lines` maps the name of a model to the arms that sample it, and each arm to the text beside its point.

    A line joins the arms of a model in the order of `x`; error bars are 95 % intervals over samples.
    """
    steps = sorted({t for by_steps in y.values.values() for t in by_steps})
    with plt.rc_context(STYLE):
        figure, axes = _plots(len(steps))
        for ax, t in zip(axes, steps, strict=True):
            for index, (model, arms) in enumerate(lines.items()):
                sampled = {arm: mark for arm, mark in arms.items() if t in y.values.get(arm, {})}
                _draw_frontier(ax, x, y, sampled, t, label=model, **_style(index))
            ax.set(title=f"T = {t}", xlabel=x.title, ylabel=y.title)
        _legend_below(figure, axes)
        return save_figure(figure, path)


def _draw_frontier(ax: Axes, x: Panel, y: Panel, arms: Mapping[str, str], steps: int, **style: Any) -> None:
    ordered = sorted(arms, key=lambda arm: x.values[arm][steps].estimate.value)
    found = [[panel.values[arm][steps].estimate for arm in ordered] for panel in (x, y)]
    at = [[estimate.value * panel.scale for estimate in own] for panel, own in zip((x, y), found, strict=True)]
    errors = [[_error(e, panel.scale) for e in own] for panel, own in zip((x, y), found, strict=True)]
    ax.errorbar(
        at[0], at[1], xerr=np.transpose(errors[0]), yerr=np.transpose(errors[1]), capsize=2, ms=5, lw=1.5, **style
    )
    for arm, place in zip(ordered, zip(*at, strict=True), strict=True):
        ax.annotate(arms[arm], place, (4, -9), textcoords="offset points", fontsize=7, color=style["color"])


def length_figure(panel: Panel, lines: Mapping[str, Mapping[int, str]], path: Path) -> Path:
    """Draw a metric against the tokens of an adaptation, one plot per T; a line maps tokens to the arm of each point.

    Error bars are 95 % intervals over samples.
    """
    steps = sorted({t for by_steps in panel.values.values() for t in by_steps})
    with plt.rc_context(STYLE):
        figure, axes = _plots(len(steps))
        for ax, t in zip(axes, steps, strict=True):
            for index, (name, arms) in enumerate(lines.items()):
                found = {n: panel.values[arms[n]][t] for n in sorted(arms) if t in panel.values.get(arms[n], {})}
                errors = np.reshape([_error(one.estimate, panel.scale) for one in found.values()], (-1, 2)).T
                x, y = [n / 1e6 for n in found], [panel.scale * one.estimate.value for one in found.values()]
                ax.errorbar(x, y, yerr=errors, label=name, capsize=3, ms=5, lw=1.6, **_style(index + 1))
            ax.set(title=f"T = {t}", xlabel="tokens of the adaptation, millions", ylabel=panel.title)
        _legend_below(figure, axes)
        return save_figure(figure, path)


def arms_figure(panels: Sequence[Panel], steps: int, path: Path) -> Path:
    """Draw values and 95 % intervals over samples at one T, one row per arm; a dashed line marks the first arm."""
    with plt.rc_context(STYLE):
        arms = list(dict.fromkeys(arm for panel in panels for arm in panel.values))
        size = (2.6 + 3.2 * len(panels), 1.2 + 0.32 * len(arms))
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
        for ax, panel in zip(axes.flat, panels, strict=True):
            _draw_arms(ax, panel, arms, steps)
        axes.flat[0].set_yticks(range(len(arms)), arms)
        axes.flat[0].invert_yaxis()
        figure.suptitle(f"T = {steps}", fontsize=12)
        figure.tight_layout()
        return save_figure(figure, path)


def _draw_arms(ax: Axes, panel: Panel, arms: Sequence[str], steps: int) -> None:
    for row, arm in enumerate(arms):
        quality = panel.values.get(arm, {}).get(steps)
        if quality is None:
            continue
        value, colour = quality.estimate.value * panel.scale, COLOURS[0 if row == 0 else 6]
        if row == 0:
            ax.axvline(value, color=COLOURS[0], ls="--", lw=1)
        error = np.reshape(_error(quality.estimate, panel.scale), (2, 1))
        ax.errorbar(value, row, xerr=error, fmt="o", color=colour, capsize=3, markersize=5)
        trainings = _trainings(quality, panel.scale)
        ax.plot(trainings, [row] * len(trainings), "x", color=colour, **_SINGLE)
    # Wrap the title, because panels are drawn side by side.
    ax.set_title(textwrap.fill(panel.marked_title, 26), fontsize=11)


def loss_figure(
    train: Mapping[str, Sequence[Row]], validation: Mapping[str, Sequence[Row]], path: Path, *, order: Sequence[str]
) -> Path:
    """Draw training loss and validation NELBO against tokens.

    The loss is drawn raw (faint) and smoothed (solid), the NELBO without (dashed) and with (solid) self-conditioning.
    `order` lists all arms and fixes their colours.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
        for index, arm in enumerate(order):
            colour = COLOURS[index % len(COLOURS)]
            _draw_training(left, train.get(arm, []), arm, colour)
            _draw_validation(right, validation.get(arm, []), arm, colour, MARKERS[index % len(COLOURS)])
        losses = np.array([row["loss"] for rows in train.values() for row in rows])
        if len(losses) > 20:  # the first steps would compress the rest of the axis
            left.set_ylim(*np.quantile(losses, [0, 0.98]) + np.array([-0.02, 0.02]) * np.ptp(losses))
        left.set(title="training loss", xlabel="tokens (million)", ylabel="nats per token")
        right.set(title="validation NELBO (averaged weights)", xlabel="tokens (million)", ylabel="nats per token")
        for ax in (left, right):
            if ax.get_legend_handles_labels()[1]:
                # Inside the axes, the legend would hide a curve.
                ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        figure.tight_layout()
        return save_figure(figure, path)


def _draw_training(ax: Axes, rows: Sequence[Row], label: str, colour: str) -> None:
    if not rows:
        return
    x = np.array([row["tokens"] for row in rows]) / 1e6
    y = np.array([row["loss"] for row in rows])
    ax.plot(x, y, color=colour, alpha=0.25, lw=0.8)
    ax.plot(x, smooth(y), color=colour, lw=1.8, label=label)


def _draw_validation(ax: Axes, rows: Sequence[Row], label: str, colour: str, marker: str) -> None:
    for key, style, suffix in (("nelbo_null", "--", "null"), ("nelbo_conditioned", "-", "conditioned")):
        points = [(row["tokens"] / 1e6, row[key]) for row in rows if row.get(key) is not None]
        if points:
            ax.plot(*zip(*points, strict=True), style, color=colour, marker=marker, ms=4, label=f"{label}, {suffix}")


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a window of 5 % of the values, which is shorter at both ends."""
    half = max(1, int(len(values) * 0.05 / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def progress_figure(rows: Sequence[Row], path: Path) -> Path:
    """Draw learning rate, gradient norm and speed of one run."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
        for ax, (key, title) in zip(
            axes,
            (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_s", "tokens per second")),
            strict=True,
        ):
            ax.plot([row["step"] for row in rows], [row.get(key, np.nan) for row in rows], color=COLOURS[6], lw=1.2)
            ax.set(title=title, xlabel="step")
        figure.tight_layout()
        return save_figure(figure, path)
