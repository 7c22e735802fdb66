"""The search for a layout, its messages when none fits, and the duration of a step."""

import dataclasses

import pytest
import torch

from scmdm.errors import UserError
from scmdm.models.flops import block_flops
from scmdm.planner import activation_memory
from scmdm.planner import search as planner_search
from scmdm.planner.communication import Collective
from scmdm.planner.duration import collective_seconds, step_time
from scmdm.planner.hardware import GPUS, Assumptions, Cluster, make_assumptions, make_cluster
from scmdm.planner.search import evaluate, impossible_because, search, usable_memory
from scmdm.planner.sharding import rank_state
from scmdm.planner.workload import make_layout, make_workload
from tests.planner.measuring import run_config, spec_of

ASSUMED = Assumptions()
VOCAB, LENGTH = 1000, 256


def case(ranks=16, batch=64, **keys):
    config = run_config("fsdp2", batch=batch, width=256, layers=8, dropout=0.1, **keys)
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    return workload, make_layout(config, ranks, torch.bfloat16), Cluster(GPUS["h100"], ranks // 8, 8)


def with_memory(cluster, bytes_):
    return dataclasses.replace(cluster, gpu=dataclasses.replace(cluster.gpu, memory=bytes_))


def test_what_is_found_fits_and_is_not_slower_than_any_other_that_fits():
    workload, layout, cluster = case()
    found = search(workload, layout, cluster, ASSUMED)
    assert found.best.fits and found.reason is None
    assert found.best.memory.peak.total <= usable_memory(cluster, ASSUMED)
    assert impossible_because(workload, found.best.layout) is None
    for size in (1, 2, 4):
        for kind in ("none", "full"):
            other = dataclasses.replace(layout, micro_batch_size=size, activation_checkpointing=kind)
            assert found.best.time.seconds <= evaluate(workload, other, cluster, ASSUMED).time.seconds * 1.01


def simplest_of_all(workload, start, cluster):
    """The result of a search that measures every layout."""
    layouts = [
        one for one in planner_search._layouts(workload, start, cluster) if not impossible_because(workload, one)
    ]
    for offload in (False, True):
        candidates = [evaluate(workload, one, cluster, ASSUMED) for one in layouts if one.offload == offload]
        fitting = [one for one in candidates if one.fits]
        if fitting:
            fastest = min(one.time.seconds for one in fitting)
            near = [one for one in fitting if one.time.seconds <= fastest * 1.01]
            return min(near, key=lambda one: (*planner_search._complexity(one.layout), one.memory.peak.total))
    return min((evaluate(workload, one, cluster, ASSUMED) for one in layouts), key=lambda one: one.memory.peak.total)


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.0, 0.6, 0.3, 0.1, 0.02])
@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_what_is_not_measured_changes_no_result(share, engine):
    workload, layout, cluster = case(ranks=8, batch=16)
    layout = dataclasses.replace(layout, engine=engine)
    largest = search(workload, layout, cluster, ASSUMED).best.memory.peak.total
    small = with_memory(cluster, largest * share / 0.9 + 1)
    found, expected = search(workload, layout, small, ASSUMED), simplest_of_all(workload, layout, small)
    if found.best is not None:
        assert found.best == expected
    else:
        assert not expected.fits and f"{expected.memory.peak.total / 2**30:.1f} GiB" in found.reason


def test_few_layouts_are_measured(monkeypatch):
    measured = []
    original = planner_search.rank_memory
    monkeypatch.setattr(planner_search, "rank_memory", lambda *given: measured.append(given) or original(*given))
    workload, layout, cluster = case()
    tried = search(workload, layout, cluster, ASSUMED).tried
    assert 0 < len(measured) < tried / 10


def test_a_length_at_which_nothing_fits_is_traced_few_times(monkeypatch):
    """Layouts whose kept inputs alone do not fit are not measured, and many positions are one sequence of them."""
    traced = set()
    measure = activation_memory._measure
    monkeypatch.setattr(activation_memory, "_measure", lambda *given: traced.add(given) or measure(*given))
    workload, layout, cluster = case(ranks=8, batch=64)
    workload = dataclasses.replace(workload, length=2**20)
    state = rank_state(workload, layout).total
    tiny = with_memory(cluster, state + 2**19 * workload.model.width)
    assert search(workload, layout, tiny, ASSUMED).best is None
    assert len(traced) == 4, "two numbers of layers, and two lengths"


def test_less_memory_means_slower_layouts_with_recomputation_and_offloading_last():
    workload, layout, cluster = case()
    largest = search(workload, layout, cluster, ASSUMED).best
    before, steps = largest.time.seconds, [largest.layout]
    bytes_ = largest.memory.peak.total * 0.9
    while True:
        found = search(workload, layout, with_memory(cluster, bytes_ / 0.9), ASSUMED)
        if found.best is None:
            break
        if steps[-1].offload == found.best.layout.offload:  # offloading is tried last, fast or not
            assert found.best.time.seconds >= before / 1.011
        before = found.best.time.seconds
        steps.append(found.best.layout)
        bytes_ = found.best.memory.peak.total * 0.9
    assert len(steps) > 3 and steps[0].activation_checkpointing == "none"
    assert [layout.offload for layout in steps] == sorted(layout.offload for layout in steps)
    assert steps[-1].offload and steps[-1].activation_checkpointing != "none"


def test_recomputation_saves_activations():
    """The layout decides, whatever the configuration of the model says."""
    workload, layout, cluster = case()
    kept = [
        evaluate(
            workload, dataclasses.replace(layout, activation_checkpointing=kind), cluster, ASSUMED
        ).memory.peak.activations
        for kind in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_nothing_fits_with_a_reason_and_a_number_of_nodes_that_would_do():
    workload, layout, cluster = case(ranks=8, batch=64)
    state = evaluate(workload, layout, cluster, ASSUMED).memory.state.total
    tiny = with_memory(cluster, state / 20)
    found = search(workload, layout, tiny, ASSUMED)
    assert found.best is None
    assert "the smallest needs" in found.reason and "most of it" in found.reason
    assert "it would fit on" in found.reason or "use a GPU with more memory" in found.reason


def test_a_batch_that_the_ranks_cannot_share_is_named():
    workload, layout, cluster = case(ranks=16, batch=4)
    found = search(workload, dataclasses.replace(layout, ranks=16), cluster, ASSUMED)
    # Context parallelism divides the ranks: 16 / 4 parts share 4 sequences.
    assert found.best is not None and found.best.layout.context == 4
    workload, layout, cluster = case(ranks=16, batch=7)
    reason = search(workload, layout, cluster, ASSUMED).reason
    assert "train.global_batch_size=7" in reason and "choose a global batch" in reason


def test_ranks_that_share_experts_which_a_model_lacks_are_named():
    workload, layout, cluster = case()
    reason = search(workload, dataclasses.replace(layout, experts=2), cluster, ASSUMED).reason
    assert "fsdp.experts=2" in reason and "model.experts=0" in reason and "batch" not in reason


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"replicate": 3}, "fsdp.replicate=3"),
        ({"context": 32}, "fsdp.context=32"),
        ({"engine": "single"}, "engine=single"),
        ({"micro_batch_size": 8}, "train.micro_batch_size=8"),
        ({"context": 8}, "model.heads"),
    ],
)
def test_what_a_run_would_refuse_is_named(change, named):
    workload, layout, _ = case()
    workload = dataclasses.replace(workload, model=dataclasses.replace(workload.model, heads=4))
    assert named in impossible_because(workload, dataclasses.replace(layout, **change))


def test_sequences_of_a_model_of_blocks_are_not_shared():
    workload, layout, cluster = case()
    workload = dataclasses.replace(workload, block_length=8)
    assert "diffusion.block_length" in impossible_because(workload, dataclasses.replace(layout, context=2))
    assert search(workload, layout, cluster, ASSUMED).best.layout.context == 1


def test_a_trunk_of_one_graph_is_not_sharded_by_blocks():
    workload, layout, cluster = case(compile="trunk")
    assert "model.compile=trunk" in impossible_because(workload, layout)
    assert search(workload, layout, cluster, ASSUMED).best is None
    assert impossible_because(workload, dataclasses.replace(layout, engine="deepspeed", stage=2)) is None


def test_every_engine_is_planned():
    workload, layout, cluster = case()
    for engine in ("fsdp2", "deepspeed"):
        best = search(workload, dataclasses.replace(layout, engine=engine), cluster, ASSUMED).best
        assert best.fits and best.layout.engine == engine
    one = Cluster(GPUS["h100"], 1, 1)
    best = search(workload, dataclasses.replace(layout, engine="single", ranks=1), one, ASSUMED).best
    assert best.fits and best.time.exposed == 0


def test_a_step_takes_what_its_products_take_when_nothing_is_sent():
    """170M parameters: 6 operations per parameter of the trunk and token, and a third of that for the estimate."""
    workload, layout, _ = case(batch=8)
    one = Cluster(GPUS["h100"], 1, 1)
    layout = dataclasses.replace(layout, engine="single", ranks=1, micro_batch_size=8)
    time = step_time(workload, layout, one, ASSUMED)
    products = time.ideal / ASSUMED.product_efficiency(workload.model.width)
    assert time.seconds == pytest.approx(products + time.parts["update"].compute)
    trunk = sum(
        p.numel for p in workload.parameters if p.block is not None and "adaLN" not in p.name and len(p.shape) > 1
    )
    assert time.ideal * 989e12 > 8 * trunk * 8 * LENGTH
    again = dataclasses.replace(layout, activation_checkpointing="full")
    slower = step_time(workload, again, one, ASSUMED).parts["backward"].compute / time.parts["backward"].compute
    assert slower == pytest.approx(1.5)
    assert step_time(workload, again, one, make_assumptions(0.18)).seconds > 1.9 * time.seconds


def test_products_in_fp8_take_the_time_of_the_fp8_peak():
    """Those of the blocks' linear maps, and no others."""
    workload, layout, _ = case(batch=8)
    one = Cluster(GPUS["h100"], 1, 1)
    layout = dataclasses.replace(layout, engine="single", ranks=1, micro_batch_size=8)
    before = step_time(workload, layout, one, ASSUMED)
    model = dataclasses.replace(workload.model, matmul_precision="fp8")
    after = step_time(dataclasses.replace(workload, model=model), layout, one, ASSUMED)
    blocks = 8 * block_flops(workload.model, LENGTH, passes=workload.passes).total
    saved = blocks * (1 / 989e12 - 1 / 1979e12)
    assert before.ideal - after.ideal == pytest.approx(saved) and 0 < saved < before.ideal / 2
    assert before.utilisation == pytest.approx(before.ideal / before.seconds)
    assert after.parts["update"] == before.parts["update"]


def test_an_update_moves_what_is_trained():
    """As much as that of all weights, in proportion: the rest is neither read nor written."""
    workload, layout, cluster = case(lora_rank=4)
    assert workload.trained_layers is not None
    only = tuple(p for p in workload.parameters if p.trained)
    whole = dataclasses.replace(workload, parameters=only, trained_layers=None)
    found, expected = (step_time(work, layout, cluster, ASSUMED).parts["update"] for work in (workload, whole))
    assert found.compute == pytest.approx(expected.compute)


def test_a_collective_takes_its_bytes_over_the_narrowest_link():
    gathered = Collective("all_gather", "blocks", "backward", "shard", 8, 8_000_000_000, 1)
    layout = dataclasses.replace(case()[1], ranks=8)
    seconds = collective_seconds(gathered, Cluster(GPUS["h100"], 1, 8), layout, ASSUMED)
    assert seconds == pytest.approx(7e9 / (450e9 * 0.8) + 8.4e-6 + 7 * 3.4e-6)
    wide = dataclasses.replace(gathered, ranks=16)
    between = collective_seconds(wide, Cluster(GPUS["h100"], 2, 8), dataclasses.replace(layout, ranks=16), ASSUMED)
    assert between == pytest.approx(7.5e9 / (400e9 * 0.8) + 8.4e-6 + 14 * 3.4e-6 + 14e-6)
    slow = collective_seconds(wide, Cluster(GPUS["h100"], 16, 1), dataclasses.replace(layout, ranks=16), ASSUMED)
    assert slow == pytest.approx(7.5e9 / (50e9 * 0.8) + 8.4e-6 + 15 * 14e-6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("abacus", 1, 8), "--gpu abacus"), (("h100", 0, 8), "--nodes 0"), (("h100", 1, 0), "--gpus-per-node 0")],
)
def test_impossible_clusters_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        make_cluster(*arguments)


def test_an_impossible_efficiency_is_named():
    with pytest.raises(UserError, match="--efficiency 2"):
        make_assumptions(2.0)


def test_efficiency_is_the_measured_one_by_width_unless_given():
    assert [round(Assumptions().product_efficiency(width), 2) for width in (64, 768, 1254, 2048, 8192)] == [
        0.36,
        0.36,
        0.44,
        0.52,
        0.52,
    ]
    assert make_assumptions(0.2).product_efficiency(768) == 0.2
