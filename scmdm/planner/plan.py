"""`scmdm plan`: from a configuration and a cluster to a plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scmdm.checkpoint.reader import find_model
from scmdm.config.fields import key
from scmdm.config.run import RunConfig
from scmdm.config.training import TrainConfig
from scmdm.data.manifest import MANIFEST_FILE, Manifest
from scmdm.errors import UserError
from scmdm.models.model_files import ModelSpec, StoredModel, open_model
from scmdm.planner.communication import Collective, step_collectives
from scmdm.planner.hardware import Assumptions, Cluster
from scmdm.planner.search import Candidate, Found, evaluate, impossible_because, search
from scmdm.planner.workload import Layout, Workload, make_layout, make_workload
from scmdm.training.setup import resolve_config

_NO_DATA = "(none: --length and --vocab)"


@dataclass
class PlanConfig(RunConfig):
    """The configuration of a run, of which nothing is required: a model's YAML alone will do."""

    run_dir: str = key("(none)", help="not used")
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=2**31))

    def validate(self) -> None:
        if self.data.path is None and not self.data.streams:
            self.data.path = _NO_DATA
        super().validate()


@dataclass(frozen=True)
class Plan:
    """What `scmdm plan` prints."""

    workload: Workload
    cluster: Cluster
    assumed: Assumptions
    configured: Layout
    as_configured: Candidate | None  # None: the run would refuse to start
    refused: str | None  # why
    found: Found

    def collectives(self, candidate: Candidate) -> tuple[Collective, ...]:
        """Of one step of a candidate."""
        return step_collectives(self.workload, candidate.layout)


def make_plan(
    config: RunConfig, cluster: Cluster, assumed: Assumptions, *, length: int | None = None, vocab: int | None = None
) -> Plan:
    """Raises UserError when sequence length or vocabulary cannot be known, or the base does not fit."""
    if not config.self_conditioning.stop_gradient:
        raise UserError("self_conditioning.stop_gradient=false is not planned: it is for ablations; leave it out")
    base = open_model(find_model(Path(config.base))) if config.base is not None else None
    config = resolve_config(config, base)
    workload = make_workload(config, _spec(config, base, length, vocab))
    dtype = torch.float32 if config.precision == "float32" else torch.bfloat16  # every GPU of the table multiplies both
    layout = make_layout(config, cluster.ranks, dtype)
    refused = impossible_because(workload, layout)
    as_configured = evaluate(workload, layout, cluster, assumed) if refused is None else None
    start = layout
    if layout.engine == "single" and cluster.ranks > 1:
        start = dataclasses.replace(layout, engine="fsdp2")
    found = search(workload, start, cluster, assumed)
    return Plan(workload, cluster, assumed, layout, as_configured, refused, found)


def _spec(config: RunConfig, base: StoredModel | None, length: int | None, vocab: int | None) -> ModelSpec:
    known = [data for data in (_manifest(config), base.manifest if base is not None else None) if data is not None]
    vocab_size = vocab if vocab is not None else next((data.vocab_size for data in known), None)
    tokens = length if length is not None else next((data.length for data in known), None)
    wanted = (("--length", tokens, "sequence length"), ("--vocab", vocab_size, "size of the vocabulary"))
    for flag, number, what in wanted:
        if number is None:
            raise UserError(
                f"{config.data.label} is no data set here, so that the {what} is not known; give {flag} NUMBER, or the "
                "path of a prepared data set as data.path"
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
    """Of the data set, or the first stream, if it is here."""
    paths = [config.data.path, *(stream.path for stream in config.data.streams.values())]
    for path in paths:
        if path is not None and (Path(path) / MANIFEST_FILE).is_file():
            return Manifest.read(Path(path))
    return None
