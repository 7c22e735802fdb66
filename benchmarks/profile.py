"""Time of a step by kind of operator, from torch's profiler: dense baseline, vanilla and adaptation.

Reported as fractions of a step: the profiler measures wall time, which other load stretches.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.baselines.dense import DenseDenoiser
from benchmarks.step import TEXT, make_engine_step
from benchmarks.timing import RESULTS, show_figures

# An operator belongs to the first kind with a word that its name contains, or else to "other".
_KINDS = {
    "matrix products": ("mm", "matmul", "gemm", "attention"),
    "softmax, exponentials": ("softmax", "exp", "log", "amax", "max", "sum", "nll"),
    "optimizer, clipping": ("adam", "norm", "foreach"),
    "new memory, copies": ("copy", "fill", "zero", "empty", "cat", "full", "clone", "pow"),
    "selection, scattering": ("scatter", "gather", "index", "where", "nonzero", "embedding", "select"),
}


def main() -> None:
    """Draw a bar for each kind of step into `RESULTS`, and print its parts in per cent."""
    dense, dense_step = make_engine_step(TEXT, rate=0.0)
    dense.denoiser = DenseDenoiser(dense.model)
    steps: dict[str, Callable[[], object]] = {
        "dense vanilla": dense_step,
        "vanilla": make_engine_step(TEXT, rate=0.0)[1],
        "adaptation": make_engine_step(TEXT, rate=1.0)[1],
    }
    found = {name: _milliseconds(step) for name, step in steps.items()}
    shares = {name: {k: 100 * v / sum(parts.values()) for k, v in parts.items()} for name, parts in found.items()}
    texts = {name: ", ".join(f"{k} {v:.0f}" for k, v in parts.items()) for name, parts in shares.items()}
    show_figures(f"profile, per cent of a step ({TEXT.name})", texts, found)
    draw(shares)


def _milliseconds(step: Callable[[], object]) -> dict[str, float]:
    """Measure the time of operators without the operators that they call, on the GPU if there is one."""
    step()
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as recorded:
        step()
    parts = dict.fromkeys([*_KINDS, "other"], 0.0)
    for event in recorded.key_averages():
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        parts[_kind(event.key.lower())] += microseconds / 1e3
    return parts


def _kind(operator: str) -> str:
    return next((kind for kind, words in _KINDS.items() if any(word in operator for word in words)), "other")


def draw(found: dict[str, dict[str, float]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
    left = dict.fromkeys(found, 0.0)
    for kind in (*_KINDS, "other"):
        widths = [parts[kind] for parts in found.values()]
        ax.barh(list(found), widths, left=list(left.values()), label=kind)
        left = {name: left[name] + parts[kind] for name, parts in found.items()}
    ax.invert_yaxis()
    ax.set_xlabel(f"per cent of a step, {TEXT.name}")
    ax.set_xlim(0, 100)
    ax.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(RESULTS / "profile.png", dpi=120)
    plt.close(figure)
