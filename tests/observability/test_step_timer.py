"""Timing of a step's parts, FLOPs against torch's own counter, the slowest rank, profiler traces."""

import json
import resource
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scmdm.cli import main
from scmdm.config.run import RunConfig
from scmdm.config.training import PROFILED_STEPS
from scmdm.diffusion.blocks import both_copies, dense_mask, places_of
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import NoisedBatch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import State
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.flops import StepFlops, step_flops
from scmdm.models.initialization import init_weights
from scmdm.models.lora import freeze
from scmdm.observability import step_timer
from scmdm.observability.run_metrics import read_metrics
from scmdm.observability.step_timer import PARTS, LoggingWindow, Profiler, StepTimer, Utilization, summarize_parts
from tests.conftest import TINY

VOCAB, MASK, LENGTH, BATCH = 50, 49, 32, 8


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_flops_agree_with_torchs_counter(passes):
    """Every position masked half of the time, as the log-linear schedule has it; within 2 %: the time condition and the
    projections of single rows are left out."""
    # Plain products: the counter does not know the CPU's fused attention.
    config = DiTConfig(width=64, layers=3, heads=2, condition_width=2, self_conditioned=passes > 0, attention="matmul")
    model = DiT(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    z = torch.randint(0, VOCAB - 1, (BATCH, LENGTH))
    z[:, ::2] = MASK
    x, t = z.clamp(max=VOCAB - 2), torch.full((BATCH,), 0.5).double()
    estimate = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for _ in range(passes):
            estimate = model.estimate(State(z, t, estimate))
    counted = counter.get_total_flops() / BATCH
    expected = step_flops(config, VOCAB, LENGTH, LogLinear(), passes=passes)
    assert expected.estimate_passes == pytest.approx(counted, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model.weighted_nll(State(z, t, estimate), x, torch.ones(z.shape))[0].backward()
    assert expected.loss_pass == pytest.approx(counter.get_total_flops() / BATCH, rel=0.05)


def test_an_adaptation_step_is_four_thirds_of_a_vanilla_one_in_a_deep_trunk():
    config = DiTConfig(width=512, layers=24, heads=8, self_conditioned=True)
    flops = step_flops(config, 34, 128, LogLinear(), passes=1)
    assert flops.total / flops.loss_pass == pytest.approx(4 / 3, rel=0.01)


def test_entering_at_half_depth_is_seven_sixths():
    config = DiTConfig(width=512, layers=24, heads=8, self_conditioned=True, inject_layer=12)
    flops = step_flops(config, 34, 128, LogLinear(), passes=1, shared_layers=12)
    assert flops.total / flops.loss_pass == pytest.approx(7 / 6, rel=0.01)


@pytest.mark.parametrize(("last_layers", "inject_layer"), [(None, 2), (1, 2), (2, 1), (0, 2)])
def test_flops_of_shared_and_of_frozen_blocks_agree_with_torchs_counter(last_layers, inject_layer):
    keys = {"width": 64, "layers": 3, "heads": 2, "condition_width": 2, "attention": "matmul"}
    config = RunConfig(model=DiTConfig(self_conditioned=True, inject_layer=inject_layer, **keys))
    config.train.last_layers, config.self_conditioning.rate = last_layers, 1.0
    model = DiT(config.model, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    freeze(model, config)
    x = torch.randint(0, VOCAB - 1, (BATCH, LENGTH))
    z, t = x.clone(), torch.full((BATCH,), 0.5).double()
    z[:, ::2] = MASK
    batch = NoisedBatch(x, z, t, torch.ones_like(x).bool(), torch.ones(BATCH).bool())
    with FlopCounterMode(display=False) as counter:
        share = config.shared_layers > 0
        self_conditioned_nelbo(model, batch, LogLinear(), condition=True, share_lower=share).loss.backward()
    more = {"trained_layers": last_layers, "shared_layers": config.shared_layers}
    expected = step_flops(config.model, VOCAB, LENGTH, LogLinear(), passes=1, **more)
    assert expected.total == pytest.approx(counter.get_total_flops() / BATCH, rel=0.05)


@pytest.mark.parametrize("size", [1, 4, 16, 99])
def test_a_model_of_blocks_has_twice_the_products_and_the_pairs_of_its_mask(size):
    config = DiTConfig(width=64, layers=2, heads=2)
    plain, blocks = (step_flops(config, 34, 16, LogLinear(), passes=0, block_length=own) for own in (None, size))
    places = both_copies(places_of(16, size, None, torch.device("cpu")))
    pairs = int(dense_mask(places, places).sum()) - 16**2
    more = config.layers * (2 * config.block_matrix_elements() * 16 + 4 * pairs * config.attention_width)
    assert blocks.forward - plain.forward == pytest.approx(more)


def test_utilization_by_hand():
    """Two ranks, 10 sequences a second together, 4e12 operations each of which 3e12 in the loss pass, peak 1e14."""
    found = Utilization(StepFlops(1e12, 2e12, 1e12), 1e14, 2).at(10)
    assert found == {"tflops": 20, "tflops_loss_pass": 15, "mfu": 0.2, "mfu_loss_pass": 0.15}
    assert Utilization(StepFlops(1e12, 2e12, 1e12), None, 1).at(10)["mfu"] is None


def test_timer_and_window():
    started = time.perf_counter()
    timer, window = StepTimer(torch.device("cpu")), LoggingWindow()
    with timer.part("data"):
        time.sleep(0.05)
    with window.paused():
        time.sleep(0.2)
    window.add(7)
    assert 0.05 <= window.seconds() <= time.perf_counter() - started - 0.2
    assert (window.steps, window.tokens) == (1, 7)
    seconds = timer.read()
    assert seconds["data"] >= 0.05 and sum(seconds.values()) == seconds["data"]
    assert sum(timer.read().values()) == 0


def test_the_slowest_rank_is_the_one_that_waits_least(monkeypatch):
    ranks = [{**dict.fromkeys(PARTS, 0.0), "sync": wait, "data": 2.0} for wait in (4.0, 4.2, 0.1, 4.1)]
    gathered = [[rank[name] / 2 for name in PARTS] for rank in ranks]
    monkeypatch.setattr(step_timer, "gather_numbers", lambda _: gathered)
    found = summarize_parts(ranks[0], steps=2)
    assert (found["slowest_rank"], found["data_s"]) == (2, 1.0)
    assert found["slowest_rank_lag_s"] == pytest.approx((4.05 - 0.1) / 2)


def test_a_run_logs_the_seconds_of_each_part_and_writes_a_trace(molecules, empty_yaml, tmp_path):
    run = tmp_path / "run"
    keys = ["train.steps=8", "train.profile_step=3", "self_conditioning.rate=1", *TINY, "train.checkpoint_every=4"]
    assert main(["train", str(empty_yaml), f"run_dir={run}", f"data.path={molecules}", *keys]) == 0
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    for row in rows:
        assert all(row[f"{name}_s"] > 0 for name in ("data", "sync", "pass_1", "pass_2", "backward", "optimizer"))
        assert 0 < row["tflops_loss_pass"] < row["tflops"] and row["mfu"] is None
        assert row["peak_memory_gib"] > 0.05 and row["slowest_rank"] is None
    # A save falls behind its step's row: into the next one.
    assert [row["step"] for row in rows if row["checkpoint_s"] > 0] == [5]
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "step_00000003_rank_0.json"
    assert any("attn" in event.get("name", "") or "mm" in event.get("name", "") for event in events(trace))


def test_a_trace_that_the_disk_has_no_room_for_is_not_reported_as_written(tmp_path, caplog):
    profiler = Profiler(tmp_path, 1, 0)
    profiler.before(1)
    for _ in range(500):
        torch.ones(2, 2) @ torch.ones(2, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert profiler.after(PROFILED_STEPS) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "profile").iterdir()) == []
    assert "step_00000001_rank_0.json" in caplog.text


def events(trace):
    return json.loads(trace.read_text())["traceEvents"]
