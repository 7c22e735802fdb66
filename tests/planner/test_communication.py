"""Planned collectives, against those of real steps with a fake process group."""

import collections

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.counting import fake_ranks
from scmdm.models import attention
from scmdm.planner.communication import step_collectives
from scmdm.planner.workload import make_layout, make_workload
from tests.distributed.collectives import CollectiveCounter
from tests.planner.measuring import Collectives, engine_of, loss_of, masked_batch, run_config, spec_of

VOCAB, LENGTH = 61, 32


def planned(config, ranks, dtype):
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    return step_collectives(workload, make_layout(config, ranks, dtype))


def counted(collectives):
    """Times by kind and size, as `Collectives` counts them."""
    found = collections.Counter()
    for one in collectives:
        found[one.kind, one.size] += one.times
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rate", "passes", "batches", "fsdp", "model"),
    [
        (0.0, 1, 1, {}, {}),
        (1.0, 1, 1, {}, {}),
        (1.0, 1, 3, {}, {}),
        (1.0, 2, 1, {}, {"activation_checkpointing": "full"}),
        (1.0, 2, 1, {"reshard_after_estimate": True}, {"head_precision": "float32"}),
        (1.0, 1, 2, {"reshard_after_estimate": True}, {}),
        (1.0, 1, 2, {"replicate": 2}, {}),
        (1.0, 1, 2, {}, {"inject_layer": 2}),
        (1.0, 2, 1, {"reshard_after_estimate": True}, {"inject_layer": 1, "activation_checkpointing": "full"}),
    ],
)
def test_fsdp2_sends_what_is_planned_to_the_byte(rate, passes, batches, fsdp, model, dtype):
    ranks = 6
    config = run_config("fsdp2", rate=rate, batch=ranks * batches, fsdp=fsdp, **model)
    config.self_conditioning.passes = passes
    with fake_ranks(ranks):
        engine = engine_of(config, VOCAB, LENGTH, dtype)
        batch = masked_batch(1, LENGTH, VOCAB)
        with Collectives() as sent:
            for index in range(batches):
                engine.backward(loss_of(engine, config, batch), last=index == batches - 1)
    assert counted(planned(config, ranks, dtype)) == sent.seen


@pytest.mark.parametrize("reshard", [False, True])
def test_lower_blocks_are_gathered_once_for_all_forward_passes(reshard):
    """The two lower blocks, of four, are gathered once for both forward passes, and once more for the backward pass."""
    blocks = []
    for inject_layer, rate in ((2, 1.0), (0, 1.0), (0, 0.0)):
        fsdp = {"reshard_after_estimate": reshard}
        config = run_config("fsdp2", rate=rate, batch=4, fsdp=fsdp, inject_layer=inject_layer, layers=4)
        with fake_ranks(4):
            engine = engine_of(config, VOCAB, LENGTH)
            with CollectiveCounter() as counter:
                loss = loss_of(engine, config, masked_batch(1, LENGTH, VOCAB))
            forward = counter.number.total()
            with CollectiveCounter() as counter:
                engine.backward(loss, last=True)
        blocks.append((forward - 1, counter.number["_allgather_base_"]))
    assert blocks == [(6, 4) if reshard else (4, 4), (8, 4) if reshard else (4, 4), (4, 4)]


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="the counter of torch 2.11 fails in modules with hooks")
@pytest.mark.parametrize("reshard", [False, True])
def test_torch_counts_as_many_collectives(reshard):
    config = run_config("fsdp2", batch=4, fsdp={"reshard_after_estimate": reshard, "replicate": 2})
    with fake_ranks(4):
        engine = engine_of(config, VOCAB, LENGTH)
        with CommDebugMode() as counter:
            engine.backward(loss_of(engine, config, masked_batch(1, LENGTH, VOCAB)), last=True)
    times = collections.Counter()
    for one in planned(config, 4, torch.float32):
        times[one.kind] += one.times
    counts = counter.get_comm_counts()
    names = {"all_gather": "_allgather_base_", "reduce_scatter": "_reduce_scatter_base_", "all_reduce": "allreduce_"}
    assert times == {kind: counts[getattr(torch.ops.c10d, name)] for kind, name in names.items()}


class _Exchange(torch.autograd.Function):
    """The shapes of `attention._exchange`, which a pretended group on a CPU cannot make, and a note of each."""

    @staticmethod
    def forward(ctx, x, ranks, sliced, slice_next, seen):
        ctx.given = (ranks, slice_next, sliced, seen)
        seen["all_to_all", x.nbytes] += 1
        return torch.cat([x] * ranks, sliced).chunk(ranks, slice_next)[0].contiguous()

    @staticmethod
    def backward(ctx, gradient):
        ranks, sliced, slice_next, seen = ctx.given
        seen["all_to_all", gradient.nbytes] += 1
        return torch.cat([gradient] * ranks, sliced).chunk(ranks, slice_next)[0].contiguous(), None, None, None, None


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_context_parallelism_exchanges_what_is_planned(kind, monkeypatch):
    """Made again in the backward pass where activations are."""
    seen = collections.Counter()
    monkeypatch.setattr(attention, "_exchange", lambda x, mesh, a, b: _Exchange.apply(x, mesh.size(), a, b, seen))
    monkeypatch.setattr("scmdm.distributed.context_parallel.SlicedDenoiser.weighted_nll", _sliced_nll)
    config = run_config("fsdp2", batch=4, micro=2, fsdp={"context": 2}, activation_checkpointing=kind)
    with fake_ranks(4):
        engine = engine_of(config, VOCAB, LENGTH, torch.bfloat16)
        engine.backward(loss_of(engine, config, masked_batch(2, LENGTH, VOCAB)), last=True)
    assert seen == counted(one for one in planned(config, 4, torch.bfloat16) if one.kind == "all_to_all")


def _sliced_nll(self, state, x_BL, weight_BL):
    """Without putting the slices' values together, which does the same to a pretended group."""
    total, nll_BL = self._denoiser.weighted_nll(self._sliced(state), self._slice(x_BL), self._slice(weight_BL))
    return total, torch.cat([nll_BL, nll_BL], 1)


def test_one_process_sends_nothing():
    assert planned(run_config("single"), 1, torch.float32) == ()
    assert planned(run_config("fsdp2"), 1, torch.float32) == ()


def test_what_a_rank_sends_is_less_than_the_whole():
    """Of a ring of n: (n - 1) / n of it, twice that for an all-reduce."""
    config = run_config("fsdp2", batch=4, fsdp={"replicate": 2})
    collectives = planned(config, 4, torch.float32)
    assert collectives
    for one in collectives:
        assert one.ranks == 2
        assert one.sent == one.size * one.times * (2 if one.kind == "all_reduce" else 1) // 2
