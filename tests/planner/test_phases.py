"""Phases besides the steps, and the configurations of configs/scale, each planned for the hardware that it names."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scmdm.config.loading import load_config
from scmdm.config.planning import PhaseSettings
from scmdm.diffusion.state import State
from scmdm.planner.activation_memory import LiveBytes
from scmdm.planner.hardware import Assumptions, make_assumptions, make_cluster
from scmdm.planner.phases import plan_phases
from scmdm.planner.plan import PlanConfig, make_plan
from scmdm.planner.plan_report import settings
from scmdm.planner.search import evaluate, impossible_because, usable_memory
from scmdm.planner.sharding import FLOAT32, rank_state
from scmdm.planner.workload import make_layout, make_workload
from scmdm.sampling import batch_size
from scmdm.training.setup import resolve_config
from tests.conftest import ROOT
from tests.planner.measuring import engine_of, run_config, spec_of

SCALE = [
    *sorted((ROOT / "configs/scale").glob("*.yaml")),
    *sorted((ROOT / "configs/adapt").glob("*.yaml")),
    ROOT / "configs/text/ar-to-diffusion.yaml",
]
VOCAB, LENGTH, DEFAULTS = 1000, 64, PhaseSettings()


def named_hardware(path):
    (line,) = (line for line in Path(path).read_text().splitlines() if line.startswith("# Planned for:"))
    return dict(re.findall(r"--([a-z-]+) (\S+)", line))


def cluster_of(options):
    return make_cluster(options["gpu"], int(options["nodes"]), int(options["gpus-per-node"]))


def phases_of(ranks, *, rate=1.0, engine="fsdp2", length=LENGTH, given=DEFAULTS, samples=256, **keys):
    config = run_config(engine, rate=rate, batch=64, width=64, layers=3, **keys)
    workload = make_workload(config, spec_of(config, VOCAB, length))
    layout = make_layout(config, ranks, torch.bfloat16)
    cluster = make_cluster("h100", max(1, ranks // 8), min(ranks, 8))
    phases = plan_phases(workload, layout, cluster, Assumptions(), given, validation_samples=samples, adapts=rate > 0)
    return workload, layout, {phase.name: phase for phase in phases}


def test_every_share_shrinks_with_the_ranks():
    (_, _, few), (_, _, many) = phases_of(8), phases_of(64)
    assert few.keys() == many.keys()
    for name in ("open the base", "open a checkpoint", "save"):
        assert many[name].transferred == pytest.approx(few[name].transferred / 8, rel=0.1)
    for name in ("validation", "sampling", "evaluation"):
        assert many[name].sequences == few[name].sequences / 8
        assert many[name].batch_size <= few[name].batch_size


def test_bytes_of_files():
    """A rank verifies its share and reads its shard; all ranks together write each number once."""
    workload, layout, phases = phases_of(8)
    state = rank_state(workload, layout)
    assert phases["open the base"].transferred == workload.numel * FLOAT32 // 8 + state.weights
    kept = state.weights + state.moments + state.averages
    assert phases["save"].transferred == kept and phases["open a checkpoint"].transferred == 2 * kept
    _, _, replicated = phases_of(8, fsdp={"replicate": 2})
    assert replicated["save"].transferred == pytest.approx(kept, rel=0.1)
    slower = phases_of(8, given=PhaseSettings(file_system=1.0))[2]["save"]
    assert slower.seconds == pytest.approx(10 * phases["save"].seconds) and slower.stall == phases["save"].stall


def test_vanilla_runs_open_no_base_and_need_less_time():
    _, _, vanilla = phases_of(8, rate=0.0)
    _, _, adapted = phases_of(8)
    assert "open the base" not in vanilla
    assert vanilla["sampling"].seconds < adapted["sampling"].seconds
    assert vanilla["validation"].seconds < adapted["validation"].seconds
    assert "validation" not in phases_of(8, samples=0)[2]


def test_less_memory_means_smaller_batches():
    workload, layout, phases = phases_of(8)
    cluster, found = make_cluster("h100", 1, 8), []
    for share in (1.4, 0.9, 0.1):
        memory = phases["sampling"].memory * share / 0.9
        small = dataclasses.replace(cluster, gpu=dataclasses.replace(cluster.gpu, memory=memory))
        planned = plan_phases(workload, layout, small, Assumptions(), DEFAULTS, validation_samples=8, adapts=True)
        (sampling,) = (phase for phase in planned if phase.name == "sampling")
        assert sampling.fits == (sampling.memory <= usable_memory(small, Assumptions()))
        found.append(sampling)
    assert found[0].batch_size == phases["sampling"].batch_size > found[-1].batch_size
    assert [phase.memory for phase in found] == sorted((phase.memory for phase in found), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_sampling_are_those_of_the_command(dtype, monkeypatch):
    workload, layout, _ = phases_of(1, engine="single")
    layout, cluster = dataclasses.replace(layout, dtype=dtype), make_cluster("h100", 1, 1)
    cluster = dataclasses.replace(cluster, gpu=dataclasses.replace(cluster.gpu, memory=2**28))
    planned = plan_phases(workload, layout, cluster, Assumptions(), DEFAULTS, validation_samples=8, adapts=True)
    (sampling,) = (phase for phase in planned if phase.name == "sampling")
    config = run_config("single", rate=1.0, batch=64, width=64, layers=3)
    spec = spec_of(config, VOCAB, LENGTH)
    loaded = SimpleNamespace(model=spec.build(), spec=dataclasses.replace(spec, model=workload.model))
    free = int(usable_memory(cluster, Assumptions())) - workload.numel * FLOAT32
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: free)
    fitting = batch_size.fitting_batch_size(loaded, torch.device("cuda"), dtype, LENGTH)
    assert sampling.batch_size == batch_size.even_batch_size(DEFAULTS.samples, 1, fitting)
    assert 1 < sampling.batch_size < batch_size.LARGEST_BATCH and sampling.fits


def test_memory_of_a_validation_is_that_of_a_real_pass():
    """One process: live bytes of a pass without gradients, besides the training state."""
    workload, layout, _ = phases_of(1, engine="single", micro=8)
    layout = dataclasses.replace(layout, dtype=torch.float32, gpu=False)
    cluster = make_cluster("h100", 1, 1)
    planned = plan_phases(workload, layout, cluster, Assumptions(), PhaseSettings(), validation_samples=8, adapts=True)
    (validation,) = (phase for phase in planned if phase.name == "validation")
    state = rank_state(workload, layout)
    passing = validation.memory - 2 * state.weights - state.moments - state.averages
    config = run_config("single", rate=1.0, batch=64, width=64, layers=3, micro=8)
    engine = engine_of(config, VOCAB, LENGTH)
    engine.model.eval()
    live = LiveBytes([*engine.model.parameters(), *engine.model.buffers()])
    tokens = torch.full((8, LENGTH), VOCAB - 1)
    with torch.no_grad(), live:
        engine.denoiser.estimate(State(tokens, torch.ones(8).double()))
    assert passing == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("path", SCALE, ids=lambda path: path.stem)
def test_a_configuration_fits_the_hardware_that_it_names(path):
    options = named_hardware(path)
    config = resolve_config(load_config(PlanConfig, path), None)
    cluster, assumed = cluster_of(options), make_assumptions()
    workload = make_workload(config, spec_of(config, int(options["vocab"]), int(options["length"])))
    layout = make_layout(config, cluster.ranks, torch.bfloat16)
    assert impossible_because(workload, layout) is None
    assert evaluate(workload, layout, cluster, assumed).fits
    phases = plan_phases(
        workload,
        layout,
        cluster,
        assumed,
        PhaseSettings(),
        validation_samples=config.train.validation_samples,
        adapts=True,
    )
    assert [phase.name for phase in phases if not phase.fits] == []
    (held,) = {phase.weights.partition(",")[0] for phase in phases if phase.weights}
    assert held == ("bfloat16" if path.stem in ("100b-a6b", "16b-a1b", "30b") else "float32")
    assert config.data.num_canonical_nodes % cluster.nodes == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.long if path.stem not in ("170m", "8b") else ()) for path in SCALE]
)
def test_a_configuration_is_what_a_plan_proposes(path):
    options = named_hardware(path)
    length, vocab = int(options["length"]), int(options["vocab"])
    plan = make_plan(load_config(PlanConfig, path), cluster_of(options), make_assumptions(), length=length, vocab=vocab)
    assert settings(plan.configured) == settings(plan.found.best.layout)
