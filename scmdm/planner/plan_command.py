"""`scmdm plan`."""

from __future__ import annotations

from json import dumps

from scmdm.config.planning import PhaseSettings
from scmdm.errors import UserError
from scmdm.planner.hardware import make_assumptions, make_cluster
from scmdm.planner.plan import PlanConfig, make_plan
from scmdm.planner.plan_report import as_json, print_plan
from scmdm.system.terminal import Terminal


def plan(
    config: PlanConfig,
    *,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    length: int | None,
    vocab: int | None,
    efficiency: float | None,
    json: bool,
    phases: PhaseSettings,
) -> None:
    """Print the plan of a run on a cluster. Raises UserError when no layout fits."""
    cluster = make_cluster(gpu, nodes, gpus_per_node)
    made = make_plan(config, cluster, make_assumptions(efficiency), length=length, vocab=vocab, phases=phases)
    if json:
        print(dumps(as_json(made), indent=2))
    else:
        print_plan(made, Terminal())
    if made.found.best is None:
        raise UserError(f"nothing fits: {made.found.reason}")
