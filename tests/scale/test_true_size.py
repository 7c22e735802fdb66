"""Steps of models of 8 to 100 billion parameters, sharded over ranks that do not exist, on tensors without memory.

The process is rank 0. Its model, engine, collectives' shapes and passes are those of a run; storages are counted.
"""

import gc
import math

import pytest
import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from benchmarks.counting import fake_ranks, following_resizes
from scmdm.config.loading import load_config
from scmdm.diffusion.state import State
from scmdm.diffusion.token_draw import draw_tokens
from scmdm.models.network import count_parameters
from scmdm.ops import output_head_cpu
from scmdm.planner.activation_memory import LiveBytes, _EverythingMasked, _PretendedGroup
from scmdm.planner.plan import PlanConfig
from scmdm.planner.rank_memory import rank_memory
from scmdm.planner.workload import make_layout, make_workload
from scmdm.torch_private import fake_tensors, tree_leaves
from scmdm.training import setup
from tests.conftest import ROOT
from tests.planner.measuring import (
    CPU,
    engine_of,
    loss_of,
    masked_batch,
    run_config,
    spec_of,
)

pytestmark = pytest.mark.slow
VOCAB, LENGTH, STEPS = 126_464, 4352, 128  # a length that is no width, so that logits are known by their shape
SHAPES = {
    "8B, as LLaDA": (64, {"width": 4096, "layers": 32, "heads": 32, "mlp_width": 12_288}, (7.9e9, 8.2e9)),
    "30B": (
        256,
        {"width": 6144, "layers": 60, "heads": 48, "kv_heads": 8, "mlp_width": 21_504},
        (29e9, 32e9),
    ),
}


class Storages(LiveBytes):
    """Counts live bytes, but not of the model before it is allocated, and notes the most rows of logits."""

    def __init__(self, width, known=()):
        super().__init__(known)
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                # The storage of a DTensor has the size of the whole tensor, of which it holds a part.
                self.track(getattr(tensor, "_local_tensor", tensor).untyped_storage())
                rows = math.prod(tensor.shape[:-1])
                if tensor.shape[-1:] == (VOCAB,) and rows != self.width:  # the head's weight, transposed
                    self.rows = max(self.rows, rows)
        return result


def watched(engine, function):
    """Bytes of the shards and the most beside them, and the most rows of logits."""
    shards = [parameter.to_local() for parameter in engine.trained.values()]
    seen = Storages(engine.model.config.width, [*shards, *engine.model.buffers()])
    with seen, following_resizes(seen):
        function()
        gc.collect()
    return seen.peak + sum(shard.nbytes for shard in shards), seen.rows


def sampling_step(model):
    """The passes of one of `STEPS` steps: hidden states, tokens at revealed positions, the next step's estimate."""
    z_BL = torch.full((1, LENGTH), VOCAB - 1)
    state = State(z_BL, torch.ones(1, dtype=torch.float64), torch.zeros(1, LENGTH, model.config.width))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h_ND = model.hidden(state).flatten(0, 1)
        revealed = h_ND[: LENGTH // STEPS]
        tokens = draw_tokens(model.logits(revealed), torch.rand(len(revealed), VOCAB, dtype=torch.float64))
        return tokens, model.expected_embedding(h_ND)


@pytest.mark.parametrize("shape", ["8B, as LLaDA", pytest.param("30B", marks=pytest.mark.long)])
def test_no_step_holds_a_whole_model_or_all_logits(shape, monkeypatch):
    ranks, keys, (fewest, most) = SHAPES[shape]
    monkeypatch.setattr(output_head_cpu, "_TILE", 2**15)  # fewer operators to trace; a chunk stays as it is
    config = run_config("fsdp2", batch=ranks, kind="decoder", activation_checkpointing="full", **keys)
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    assert fewest < workload.numel < most
    whole, largest = workload.numel * 4, max(parameter.numel for parameter in workload.parameters) * 4
    plan = rank_memory(workload, make_layout(config, ranks, torch.bfloat16, gpu=False))
    with fake_ranks(ranks):
        mesh = setup.make_mesh(config.fsdp, CPU)  # reads the ranks' numbers, which fake tensors do not have
        monkeypatch.setattr(setup, "make_mesh", lambda *_: mesh)
        with fake_tensors(), _EverythingMasked():
            with Storages(0) as opening:
                engine = engine_of(config, VOCAB, LENGTH, torch.bfloat16)
            assert count_parameters(engine.model) == workload.numel
            # A new weight is drawn whole, one at a time.
            assert opening.peak < 1.01 * whole / ranks + 2.1 * largest

            batch = masked_batch(1, LENGTH, VOCAB)

            def adapt():
                engine.backward(loss_of(engine, config, batch), last=True)

            def validate():
                with torch.no_grad():
                    loss_of(engine, config, batch)

            for name in ("hidden", "logits", "expected_embedding"):
                register_fsdp_forward_method(engine.model, name)
            found, rows = {}, {}

            def sample():
                sampling_step(engine.model)

            for step in (adapt, validate, sample):
                found[step.__name__], rows[step.__name__] = watched(engine, step)
                engine.optimizer.zero_grad(set_to_none=True)
                engine.sharded.reshard()
    # Moments and averages were not made here.
    allowed = plan.peak.total - plan.state.moments - plan.state.averages
    print(shape, {name: f"{size / 2**30:.2f}" for name, size in found.items()}, f"plan {allowed / 2**30:.2f} GiB", rows)
    assert 0 < max(rows.values()) <= max(output_head_cpu.chunk_rows(2**31, VOCAB), LENGTH // STEPS)
    assert found["adapt"] == pytest.approx(allowed, rel=0.1)
    assert max(found.values()) <= 1.1 * allowed < whole


@pytest.mark.long
@pytest.mark.parametrize(("name", "ranks", "experts"), [("16b-a1b", 16, 8), ("16b-a1b", 64, 8), ("100b-a6b", 256, 8)])
def test_no_rank_of_a_mixture_holds_all_experts(name, ranks, experts, monkeypatch):
    """Rank 0 of as many GPUs: opening, and a step of one sequence with balanced loads."""
    shape = load_config(PlanConfig, ROOT / f"configs/model/{name}.yaml").model
    keys = {key: value for key, value in vars(shape).items() if key not in ("attention", "self_conditioned")}
    keys |= {
        "activation_checkpointing": "full",
        "router_bias": False,
    }  # a plain parameter, which cannot become a fake one
    fsdp = {"experts": experts, "reshard_after_estimate": True}
    config = run_config("fsdp2", batch=ranks, fsdp=fsdp, **keys)
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    layout = make_layout(config, ranks, torch.bfloat16, gpu=False)
    plan, routed = rank_memory(workload, layout), sum(p.numel for p in workload.parameters if p.routed)
    monkeypatch.setattr(output_head_cpu, "_TILE", 2**15)
    with fake_ranks(ranks):
        mesh, shares = setup.make_mesh(config.fsdp, CPU), setup.make_expert_mesh(config.fsdp, CPU)
        monkeypatch.setattr(setup, "make_mesh", lambda *_: mesh)
        monkeypatch.setattr(setup, "make_expert_mesh", lambda *_: shares._replace(group=_PretendedGroup(experts)))
        with fake_tensors(), _EverythingMasked():
            with Storages(0) as opening:
                engine = engine_of(config, VOCAB, LENGTH, torch.bfloat16)
            assert count_parameters(engine.model) == workload.numel
            held = [value.to_local().numel() for name, value in engine.trained.items() if name in engine._experts]
            assert sum(held) * ranks == routed
            assert opening.peak < 1.01 * workload.numel * 4 / ranks + 2**26

            def adapt():
                engine.backward(loss_of(engine, config, masked_batch(1, LENGTH, VOCAB)), last=True)

            found, _ = watched(engine, adapt)
    allowed = plan.peak.total - plan.state.moments - plan.state.averages
    print(name, ranks, f"{found / 2**30:.2f} GiB, plan {allowed / 2**30:.2f} GiB")
    assert 0.65 * allowed < found <= allowed
