"""Output of a plan: tables, or JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from scmdm.planner.phases import Phase
from scmdm.planner.plan import Plan
from scmdm.planner.search import Candidate, usable_memory
from scmdm.planner.workload import ParallelLayout
from scmdm.system.terminal import Terminal

_GIB, _GB = 2**30, 1e9
NOTE = (
    "Training state and collectives are counted (exactly, except for DeepSpeed stage 3). Activations are measured on "
    "fake tensors with the real model; the sum is tested against real passes on a CPU. Time is modelled: "
    "steps on one H100 were within 4 % of it, and nothing between GPUs has been measured."
)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return all figures, in bytes, seconds, operations and tokens."""
    return {
        "note": NOTE,
        "workload": {
            "parameters": plan.workload.numel,
            "default_model": plan.default_model,
            "active_parameters": plan.workload.active_numel,
            "length": plan.workload.length,
            "vocab_size": plan.workload.vocab_size,
            "global_batch_size": plan.workload.global_batch,
            "no_grad_passes": plan.workload.passes,
            "matmul_precision": plan.workload.model.matmul_precision,
            "residual_precision": plan.workload.model.residual_precision,
        },
        "cluster": {**dataclasses.asdict(plan.cluster), "usable_memory": usable_memory(plan.cluster, plan.assumed)},
        "assumed": dataclasses.asdict(plan.assumed),
        "configured": _candidate_json(plan, plan.as_configured) or {"refused": plan.refused},
        "best": _candidate_json(plan, plan.found.best),
        "reason": plan.found.reason,
        "layouts_tried": plan.found.tried,
    }


def _candidate_json(plan: Plan, candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    memory, time = candidate.memory, candidate.time
    return {
        "settings": settings(candidate.layout),
        "fits": candidate.fits,
        "memory": {
            "peak": memory.peak.total,
            "peak_at": memory.peak_at,
            "between_steps": dataclasses.asdict(memory.state),
            "moments_of_a_step": {name: dataclasses.asdict(moment) for name, moment in memory.steps.items()},
            "host": memory.host,
        },
        "collectives": [{**dataclasses.asdict(one), "sent": one.sent} for one in plan.collectives(candidate)],
        "time": {
            "step_s": time.seconds,
            "parts": {name: dataclasses.asdict(part) for name, part in time.parts.items()},
            "exposed_s": time.exposed,
            "tokens_per_day": time.tokens_per_day,
            "mfu": time.utilisation,
        },
        "phases": {phase.name: _phase_json(phase) for phase in plan.phases(candidate)},
    }


def _phase_json(phase: Phase) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(phase).items() if name != "name"}


def settings(layout: ParallelLayout) -> dict[str, str | int | bool]:
    """Return a layout as configuration keys of its engine."""
    own: dict[str, str | int | bool] = {
        "engine": layout.engine,
        "precision": str(layout.dtype).removeprefix("torch."),
        "train.micro_batch_size": layout.micro_batch_size,
        "model.activation_checkpointing": layout.activation_checkpointing,
    }
    if layout.engine == "fsdp2":
        own |= {
            "fsdp.replicate": layout.replicate,
            "fsdp.context": layout.context,
            "fsdp.experts": layout.experts,
            "fsdp.reshard_after_estimate": layout.reshard_after_estimate,
            "fsdp.offload": layout.offload,
        }
    if layout.engine == "deepspeed":
        own |= {
            "deepspeed.stage": layout.stage,
            "deepspeed.param_persistence_threshold": layout.param_persistence_threshold,
        }
    return own


def print_plan(plan: Plan, console: Terminal) -> None:
    """Print tables of the configured and the best layout, and the assumptions."""
    work, cluster = plan.workload, plan.cluster
    kind = f"adaptation ({work.passes} no-grad pass{'es' if work.passes > 1 else ''})" if work.passes else "vanilla"
    trained = sum(parameter.numel for parameter in work.trained)
    part = f" ({trained / 1e6:,.1f}M trained)" if work.trained_layers is not None else ""
    part += f" ({work.active_numel / 1e6:,.1f}M active)" if work.active_numel != work.numel else ""
    console.print(
        f"{work.numel / 1e6:,.1f}M parameters{part}, {kind}, {work.global_batch} sequences of {work.length} tokens per "
        f"step, vocabulary {work.vocab_size}; {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}",
    )
    if plan.default_model:
        console.print(
            f"This is the default model (width {work.model.width}, {work.model.layers} layers): give base=..., or keys "
            "of `model`, for another."
        )
    columns = {"as configured": plan.as_configured, "best found": plan.found.best}
    shown = {title: candidate for title, candidate in columns.items() if candidate is not None}
    if plan.refused:
        console.print(f"the run as configured would not start: {plan.refused}")
    if shown:
        for table in (_settings_table(plan, shown), _memory_table(plan, shown), _traffic_table(plan, shown)):
            console.print(table)
        console.print(_time_table(shown))
        for title, candidate in shown.items():
            if title == "as configured" or candidate.layout != plan.configured:
                console.print(_phases_table(plan, title, candidate))
    if plan.found.reason:
        console.print(plan.found.reason)
    else:
        console.print(f"best of {plan.found.tried} layouts that were tried")
    console.print(_assumptions(plan))
    console.print(NOTE)


def _table(title: str, shown: dict[str, Candidate]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in shown:
        table.add_column(name, justify="right")
    return table


def _settings_table(plan: Plan, shown: dict[str, Candidate]) -> Table:
    table = _table("settings", shown)
    each = [settings(candidate.layout) for candidate in shown.values()]
    for key in dict.fromkeys(key for one in each for key in one):
        table.add_row(key, *(str(one.get(key, "")) for one in each))
    batches = (str(candidate.layout.micro_batches(plan.workload)) for candidate in shown.values())
    table.add_row("micro-batches per step and rank", *batches)
    return table


def _memory_table(plan: Plan, shown: dict[str, Candidate]) -> Table:
    table = _table("memory per rank, GiB, at the highest moment of a step", shown)
    peaks = [candidate.memory.peak for candidate in shown.values()]
    for part in dataclasses.fields(peaks[0]):
        sizes = [getattr(peak, part.name) for peak in peaks]
        if any(sizes):
            table.add_row(part.name, *(f"{size / _GIB:.2f}" for size in sizes))
    table.add_section()
    usable = usable_memory(plan.cluster, plan.assumed) / _GIB
    totals = (f"{peak.total / _GIB:.2f}" for peak in peaks)
    table.add_row(f"total (of {usable:.1f} usable)", *totals)
    table.add_row("highest at", *(candidate.memory.peak_at for candidate in shown.values()))
    between = (
        (candidate.memory.state.total if not candidate.layout.offload else 0) / _GIB for candidate in shown.values()
    )
    table.add_row("with gradients at the update", *(f"{size:.2f}" for size in between))
    if any(candidate.memory.host for candidate in shown.values()):
        table.add_row("in host memory", *(f"{candidate.memory.host / _GIB:.2f}" for candidate in shown.values()))
    table.add_row("fits", *("yes" if candidate.fits else "NO" for candidate in shown.values()))
    return table


def _traffic_table(plan: Plan, shown: dict[str, Candidate]) -> Table:
    table = _table("sent per rank and step, GB (number of collectives)", shown)
    rows: dict[str, dict[str, tuple[float, int]]] = {}
    for name, candidate in shown.items():
        for one in plan.collectives(candidate):
            row = rows.setdefault(f"{one.kind} of {one.what} in the {one.part}, by {one.group}", {})
            sent, times = row.get(name, (0.0, 0))
            row[name] = (sent + one.sent / _GB, times + one.times)
    for label, row in rows.items():
        cells = (row.get(name) for name in shown)
        table.add_row(label, *(f"{cell[0]:.3f} ({cell[1]})" if cell else "" for cell in cells))
    if not rows:
        table.add_row("nothing", *("" for _ in shown))
    return table


def _time_table(shown: dict[str, Candidate]) -> Table:
    table = _table("time, modelled: s per step (computation / overlapping collectives / others)", shown)
    times = [candidate.time for candidate in shown.values()]
    for part in times[0].parts:
        cells = (time.parts[part] for time in times)
        table.add_row(part, *(f"{one.total:.3f} ({one.compute:.3f}/{one.beside:.3f}/{one.alone:.3f})" for one in cells))
    table.add_section()
    table.add_row("step", *(f"{time.seconds:.3f}" for time in times))
    table.add_row("without computation", *(f"{time.exposed:.3f}" for time in times))
    table.add_row("tokens per day", *(f"{time.tokens_per_day / 1e9:.2f}e9" for time in times))
    table.add_row("share of peak, all passes", *(f"{time.utilisation:.2f}" for time in times))
    return table


def _phases_table(plan: Plan, title: str, candidate: Candidate) -> Table:
    table = Table(title=f"phases besides the steps, per rank, {title}", title_justify="left")
    for name in ("", "GiB", "fits", "batch", "sequences", "GB", "s", "stall, s"):
        table.add_column(name, justify="right" if name else "left")
    for phase in plan.phases(candidate):
        numbers = (phase.batch_size, phase.sequences)
        table.add_row(
            f"{phase.name} ({phase.weights})" if phase.weights else phase.name,
            f"{phase.memory / _GIB:.1f}",
            "yes" if phase.fits else "NO",
            *(f"{number:,}" if number else "" for number in numbers),
            f"{phase.transferred / _GB:.2f}" if phase.transferred else "",
            f"{phase.seconds:,.1f}",
            f"{phase.stall:.2f}" if phase.stall else "",
        )
    return table


def _assumptions(plan: Plan) -> str:
    assumed, gpu = plan.assumed, plan.cluster.gpu
    products = f"matrix products at {assumed.product_efficiency(plan.workload.model.width):.0%} of peak"
    if plan.workload.model.matmul_precision == "fp8":
        products += ", those of the blocks' linear maps at as much of the FP8 peak (conversions are not modelled)"
    return (
        f"Assumed: {products}; collectives overlap with the computation of their "
        f"part of the step unless listed as others; links at {assumed.link_efficiency:.0%} of "
        f"{gpu.link / _GB:.0f} GB/s within a node and of {gpu.network / _GB:.0f} GB/s per GPU between nodes, "
        f"latencies of NCCL's rings; files at {plan.settings.file_system:g} GB/s for all ranks together; the "
        "optimizer's update at "
        f"{assumed.memory_efficiency:.0%} of the memory's bandwidth; {assumed.memory_reserve:.0%} of the "
        "GPU's memory kept free; all positions masked (memory), half of them on average (time). Kernel launches are "
        "not modelled: steps of a few hundredths of a second will take longer."
    )
