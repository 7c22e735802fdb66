"""`scmdm plan`: plan a run of a configuration on a cluster."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scmdm.checkpoint.model_verification import Verification
from scmdm.checkpoint.reader import find_model
from scmdm.config.fields import OnAdapt, key, walk_keys
from scmdm.config.model import ModelConfig
from scmdm.config.planning import PhaseSettings
from scmdm.config.run import RunConfig
from scmdm.config.training import TrainConfig
from scmdm.data.manifest import MANIFEST_FILE, Manifest
from scmdm.errors import UserError
from scmdm.models.model_files import ModelSpec, StoredModel, open_model
from scmdm.planner.communication import Collective, step_collectives
from scmdm.planner.hardware import Assumptions, Cluster
from scmdm.planner.phases import Phase, plan_phases
from scmdm.planner.search import Candidate, SearchResult, evaluate, impossible_because, search
from scmdm.planner.workload import ParallelLayout, Workload, make_layout, make_workload
from scmdm.training.setup import resolve_config

_NO_DATA = "(none: --length and --vocab)"


@dataclass
class PlannedTrainConfig(TrainConfig):
    """The training loop of a run whose number of steps does not matter."""

    steps: int = key(2**31, help="optimizer steps", at_least=1, at_most=2**40)


@dataclass
class PlanConfig(RunConfig):
    """The configuration of a run without mandatory keys: a model's YAML file is enough."""

    run_dir: str = key("(none)", help="not used")
    train: TrainConfig = field(default_factory=PlannedTrainConfig)

    def validate(self) -> None:
        """See `RunConfig.validate`."""
        if self.data.path is None and not self.data.streams:
            self.data.path = _NO_DATA
        super().validate()


@dataclass(frozen=True)
class Plan:
    """Result of `scmdm plan`."""

    workload: Workload
    cluster: Cluster
    assumed: Assumptions
    configured: ParallelLayout
    as_configured: Candidate | None  # None: the run would not start
    refused: str | None  # the reason why it would not start
    found: SearchResult
    settings: PhaseSettings
    validation_samples: int
    adapts: bool
    default_model: bool  # neither a base nor other sizes are given

    def phases(self, candidate: Candidate) -> tuple[Phase, ...]:
        """Phases of a run with a candidate's layout, besides its steps."""
        return plan_phases(
            self.workload,
            candidate.layout,
            self.cluster,
            self.assumed,
            self.settings,
            validation_samples=self.validation_samples,
            adapts=self.adapts,
        )

    def collectives(self, candidate: Candidate) -> tuple[Collective, ...]:
        """Collectives of one step of a candidate."""
        return step_collectives(self.workload, candidate.layout)


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    assumed: Assumptions,
    *,
    length: int | None = None,
    vocab: int | None = None,
    phases: PhaseSettings | None = None,
) -> Plan:
    """Plan a run. Raises UserError when length or vocabulary are unknown, or when the base does not match."""
    if not config.self_conditioning.stop_gradient:
        raise UserError("self_conditioning.stop_gradient=false is not possible in a plan; leave it out")
    how = Verification("descriptions")  # no weights are read
    base = open_model(find_model(Path(config.base), how)) if config.base is not None else None
    config = resolve_config(config, base)
    workload = make_workload(config, _spec(config, base, length, vocab))
    dtype = torch.float32 if config.precision == "float32" else torch.bfloat16  # all listed GPUs support both
    if config.model.matmul_precision == "fp8" and (dtype == torch.float32 or cluster.gpu.fp8_flops is None):
        where = "precision=float32" if dtype == torch.float32 else f"--gpu {cluster.gpu.name}"
        raise UserError(f"model.matmul_precision=fp8 is not possible with {where}; use matmul_precision=compute")
    layout = make_layout(config, cluster.ranks, dtype)
    refused = impossible_because(workload, layout)
    as_configured = evaluate(workload, layout, cluster, assumed) if refused is None else None
    start = layout
    if layout.engine == "single" and cluster.ranks > 1:
        start = dataclasses.replace(layout, engine="fsdp2")
    found = search(workload, start, cluster, assumed)
    adapts = config.base is not None or workload.passes > 0
    return Plan(
        workload,
        cluster,
        assumed,
        layout,
        as_configured,
        refused,
        found,
        phases or PhaseSettings(),
        config.train.validation_samples if config.train.validate_every else 0,
        adapts,
        base is None and _architecture(config.model) == _architecture(type(config.model)()),
    )


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Keys of a model that an adaptation takes from its base, such as its sizes."""
    return {name: value for name, rules, value in walk_keys(model) if rules.on_adapt is OnAdapt.FROM_BASE}


def _spec(config: RunConfig, base: StoredModel | None, length: int | None, vocab: int | None) -> ModelSpec:
    known = [data for data in (_manifest(config), base.manifest if base is not None else None) if data is not None]
    vocab_size = vocab if vocab is not None else next((data.vocab_size for data in known), None)
    tokens = length if length is not None else next((data.length for data in known), None)
    wanted = (("--length", tokens, "sequence length"), ("--vocab", vocab_size, "size of the vocabulary"))
    for flag, number, what in wanted:
        if number is None:
            raise UserError(
                f"the {what} is unknown: {config.data.label} is not a prepared data set on this machine; give {flag} N "
                "or data.path=DIRECTORY"
            )
        if number < 2:
            raise UserError(f"{flag} {number} is not possible; it must be at least 2")
    assert tokens is not None
    assert vocab_size is not None
    if base is not None and base.spec.vocab_size != vocab_size:
        raise UserError(
            f"base={base.path} has {base.spec.vocab_size} tokens, the data or --vocab {vocab_size}; leave --vocab out"
        )
    return ModelSpec(config.model, config.diffusion, vocab_size, vocab_size - 1, tokens)


def _manifest(config: RunConfig) -> Manifest | None:
    """Manifest of the data set or of the first stream that exists here."""
    paths = [config.data.path, *(stream.path for stream in config.data.streams.values())]
    for path in paths:
        if path is not None and (Path(path) / MANIFEST_FILE).is_file():
            return Manifest.read(Path(path))
    return None
