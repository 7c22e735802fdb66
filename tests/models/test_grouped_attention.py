"""Grouped keys and values give what their copies for every query head give, without those copies."""

import collections

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from scmdm.diffusion.packing import make_packing, pack_padded
from scmdm.models import attention as attention_module
from scmdm.models.attention import attend, attend_slices, exchanged_kv_heads
from scmdm.models.decoder_config import DecoderConfig
from scmdm.planner.communication import step_collectives
from scmdm.planner.workload import make_layout, make_workload
from scmdm.torch_private import ATTENTION_OPERATORS, TorchDispatchMode
from tests.planner.measuring import run_config, spec_of

HEADS = [(4, 4), (6, 2), (28, 4), (4, 1)]  # all, grouped, grouped as in Dream, one for all
LENGTH = 13  # no multiple of a kernel's block
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2], [0] * 12 + [1]])
MASKS = {
    "none": None,
    "padded": pack_padded(torch.tensor([LENGTH, 4]), LENGTH).allowed_B1LL,
    "packed": make_packing(DOCUMENTS).allowed_B1LL,
}


def tensors(heads, kv_heads, *, length=LENGTH, dtype=torch.float32, rows=2, width=16):
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    numbers = (heads, kv_heads, kv_heads)
    return [torch.randn(rows, length, n, width, generator=generator).to(dtype).requires_grad_() for n in numbers]


def expanded(q, k, v, mask):
    """The form that every kernel takes."""
    times = q.shape[2] // k.shape[2]
    return attend(q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2), "sdpa", mask)


def with_gradients(function, *inputs):
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.fixture(params=["kernel", "by heads"])
def way(request, monkeypatch):
    """With kernels that take grouped heads, and as on a GPU where none does."""
    if request.param == "by heads":
        monkeypatch.setattr(attention_module, "_takes_groups", lambda *_: False)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_forward_and_gradients_are_those_of_the_expanded_form(backend, heads, mask, way):
    inputs, allowed = tensors(*heads), MASKS[mask]
    found = with_gradients(lambda q, k, v: attend(q, k, v, backend, allowed), *inputs)
    wanted = with_gradients(lambda q, k, v: expanded(q, k, v, allowed), *inputs)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1, other.abs().max())


@pytest.mark.parametrize("length", [1, 2, 31, 300])
def test_ragged_lengths_in_bfloat16(length):
    """`auto` changes the kernel with the length. Both are compared with float64."""
    inputs = tensors(6, 2, length=length, dtype=torch.bfloat16)
    exact = with_gradients(
        lambda q, k, v: expanded(q, k, v, None), *(x.detach().double().requires_grad_() for x in inputs)
    )
    for one, other in zip(with_gradients(lambda q, k, v: attend(q, k, v, "auto"), *inputs), exact, strict=True):
        assert (one.double() - other).norm() <= 0.02 * other.norm() + 1e-6


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen, self.largest = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen[function] += 1
        first = result[0] if isinstance(result, tuple | list) else result
        self.largest = max(self.largest, first.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_a_fused_kernel_runs_with_keys_as_they_are(mask, dtype):
    """Not torch's plain operators, which keep the scores; nothing is larger than the queries."""
    q, k, v = tensors(28, 4, dtype=dtype)
    with _Operators() as run:
        attend(q, k, v, "sdpa", MASKS[mask]).sum().backward()
    assert run.seen[ATTENTION_OPERATORS[-1]] == 1
    assert run.seen[torch.ops.aten._softmax.default] == run.seen[torch.ops.aten.bmm.default] == 0
    assert run.largest == q.numel()


def most_memory(function):
    """The most bytes that lived in the function's time, inside kernels, too."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    live = most = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_queries_not_of_expanded_keys(dtype, masked):
    """Output, its gradient and the queries' gradient; the expanded form needs four more of that size."""
    q, k, v = tensors(32, 1, length=256, dtype=dtype, rows=1, width=64)
    mask = torch.ones(1, 1, 256, 256).bool() if masked else None

    def measured(function):
        def run():
            out = function(q, k, v)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        return most_memory(run)

    grouped = measured(lambda q, k, v: attend(q, k, v, "sdpa", mask))
    copied = measured(lambda q, k, v: expanded(q, k, v, mask))
    assert grouped < 3.5 * q.nbytes + (0 if mask is None else mask.numel() * q.itemsize)
    assert copied > grouped + 3 * q.nbytes


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "sent"),
    [(28, 4, 2, 4), (28, 4, 4, 4), (32, 8, 16, 16), (32, 2, 8, 8), (32, 1, 4, 4), (32, 32, 8, 32), (12, 6, 4, 12)],
)
def test_heads_of_keys_are_copied_only_as_far_as_ranks_need_them(heads, kv_heads, ranks, sent):
    assert exchanged_kv_heads(heads, kv_heads, ranks) == sent


class _Ranks:
    """A context of which this process plays every rank at once: slices lie one after the other."""

    def __init__(self, size):
        self._size = size

    def size(self):
        return self._size


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(8, 8, 4), (8, 4, 2), (8, 2, 4), (8, 1, 4), (28, 4, 4)])
def test_the_exchange_sends_grouped_heads_and_the_plan_counts_them(heads, kv_heads, ranks, monkeypatch):
    """Rank 0's bytes; all ranks hold the same slice, so that its sequences are known without other processes."""
    sent = []

    def exchange(x, context, sliced, slice_next):
        sent.append(x.nbytes)
        return torch.cat([x] * context.size(), sliced).chunk(context.size(), slice_next)[0]

    monkeypatch.setattr(attention_module, "_exchange", exchange)
    inputs = tensors(heads, kv_heads, length=8, rows=1)
    out = attend_slices(*inputs, "sdpa", _Ranks(ranks))
    whole = expanded(*(x.repeat(1, ranks, 1, 1) for x in inputs), None)
    per_rank = heads // ranks
    torch.testing.assert_close(out[:, :8, :per_rank], whole[:, :8, :per_rank], rtol=1e-6, atol=1e-6)

    keys = {"kind": "decoder", "width": heads * 16, "heads": heads, "kv_heads": kv_heads, "layers": 1}
    config = run_config("fsdp2", rate=0.0, fsdp={"context": ranks}, **keys)
    config.train.global_batch_size = 1
    workload = make_workload(config, spec_of(config, 61, 8 * ranks))
    planned = step_collectives(workload, make_layout(config, ranks, torch.float32))
    assert isinstance(workload.model, DecoderConfig)
    assert sent == [one.size for one in planned if one.kind == "all_to_all" and one.part == "loss pass"]
    assert sent[0] == 8 * 16 * 4 * (heads + 2 * exchanged_kv_heads(heads, kv_heads, ranks))


@pytest.mark.slow
def test_a_compiled_block_has_one_graph_with_the_kernel():
    """The choice of the kernel is made while tracing: it breaks no graph."""
    inputs = tensors(6, 2)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, "sdpa"), backend="eager", fullgraph=True)
    wanted = with_gradients(lambda q, k, v: attend(q, k, v, "sdpa"), *inputs)
    for one, other in zip(with_gradients(compiled, *inputs), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
