"""Planned activations and peak memory within a step, against passes that really run."""

import dataclasses
import gc

import pytest
import torch

from benchmarks.counting import fake_ranks, following_resizes
from scmdm.planner import activation_memory
from scmdm.planner.activation_memory import LiveBytes, measure_activations
from scmdm.planner.rank_memory import rank_memory
from scmdm.planner.sharding import gathered_weights, gathers_in_compute_dtype
from scmdm.planner.workload import make_layout, make_workload
from tests.planner.measuring import engine_of, loss_of, masked_batch, run_config, spec_of

VOCAB, LENGTH, ROWS = 500, 384, 2
KINDS = ("none", "selective", "full")
PRECISIONS = (torch.float32, torch.bfloat16)


def prepared(config, ranks, dtype):
    """Workload and layout; dropout keeps on a CPU what it keeps there."""
    workload = make_workload(config, spec_of(config, VOCAB, LENGTH))
    return workload, make_layout(config, ranks, dtype, gpu=False)


def measured(engine, config, rows):
    """Bytes that live between the passes, and the most before and after."""
    batch = masked_batch(rows, LENGTH, VOCAB, blocks=config.diffusion.block_length is not None)
    with LiveBytes([*engine.model.parameters(), *engine.model.buffers()]) as bytes_:
        loss = loss_of(engine, config, batch)
        gc.collect()
        kept, forward, bytes_.peak = bytes_.live, bytes_.peak, bytes_.live
        engine.backward(loss, last=True)
    return kept, forward, bytes_.peak


def planned_kept(workload, layout):
    """Kept activations, with the gradient of the head, which its forward pass computes."""
    found = measure_activations(
        workload.model,
        rows=layout.micro_batch_size,
        length=workload.length,
        dtype=layout.dtype,
        gathered=gathers_in_compute_dtype(layout),
        passes=workload.passes,
        trained_layers=workload.trained_layers,
        gpu=layout.gpu,
        block_length=workload.block_length,
    )
    return found.kept + VOCAB * workload.model.width * 4


def check_passes(config, dtype, *, backward=0.08):
    """Kept activations within 2 %; peak of the forward pass within 7 %, of the backward pass within `backward`."""
    workload, layout = prepared(config, 1, dtype)
    kept, forward, most = measured(engine_of(config, VOCAB, LENGTH, dtype), config, ROWS)
    assert planned_kept(workload, layout) == pytest.approx(kept, rel=0.02)
    memory = rank_memory(workload, layout)
    between = memory.state.total - memory.state.gradients
    peaks = {name: moment.total - between for name, moment in memory.steps.items()}
    backwards = [peaks[f"backward pass of the {which}"] for which in ("last layers", "first layer")]
    assert peaks["head of the loss pass"] == pytest.approx(forward, rel=0.07)
    assert max(backwards) == pytest.approx(most, rel=backward)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_a_dit(kind, dtype, dropout):
    config = run_config(micro=ROWS, activation_checkpointing=kind, dropout=dropout, width=128, layers=5, head_chunk=256)
    check_passes(config, dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_a_decoder(kind, dtype):
    """Two heads of keys for four of queries, wider than the residual stream."""
    sizes = {"width": 128, "layers": 5, "head_chunk": 256, "kv_heads": 2, "mlp_width": 352, "head_width": 40}
    config = run_config(micro=ROWS, kind="decoder", activation_checkpointing=kind, **sizes)
    check_passes(config, dtype, backward=0.12)


@pytest.mark.parametrize(
    "keys", [{"conditioner": "norm"}, {"conditioner": "mlp"}, {"time_conditioning": True}], ids=str
)
def test_activations_of_other_dits(keys):
    check_passes(run_config(micro=ROWS, width=128, layers=4, head_chunk=256, **keys), torch.float32)


@pytest.mark.parametrize("kind", ["dit", "decoder"])
def test_activations_of_a_narrow_residual_stream(kind):
    sizes = {"width": 128, "layers": 5, "head_chunk": 256}
    narrow, wide = (
        run_config(micro=ROWS, kind=kind, residual_precision=precision, **sizes) for precision in ("compute", "float32")
    )
    check_passes(narrow, torch.bfloat16, backward=0.12)
    kept = [planned_kept(*prepared(config, 1, torch.bfloat16)) for config in (narrow, wide)]
    assert kept[0] < 0.95 * kept[1]


@pytest.mark.parametrize(
    ("name", "kind", "dtype"), [("dit", "none", torch.float32), ("decoder", "full", torch.bfloat16)]
)
def test_activations_of_a_model_of_blocks(name, kind, dtype):
    """Two copies of each sequence, and on a CPU a dense mask of both."""
    sizes = {"kind": name, "width": 128, "layers": 5, "head_chunk": 256}
    config = run_config(micro=ROWS, activation_checkpointing=kind, **sizes)
    config.diffusion.block_length = 32
    check_passes(config, dtype, backward=0.12)


def test_blocks_need_no_dense_mask_on_a_gpu():
    """FlexAttention computes their attention, unless another kernel is named; long sequences are extrapolated."""
    found = {}
    for attention, block_length in (("auto", None), ("auto", 32), ("sdpa", 32)):
        model = run_config(attention=attention, head_chunk=256).model
        options = {"dtype": torch.bfloat16, "gathered": True, "passes": 1, "trained_layers": None, "gpu": True}
        for length in (1024, 4096):
            found[attention, block_length, length] = measure_activations(
                model, rows=1, length=length, block_length=block_length, **options
            ).kept
    assert found["auto", 32, 4096] == pytest.approx(2 * found["auto", None, 4096], rel=0.1)
    assert found["auto", 32, 4096] == pytest.approx(4 * found["auto", 32, 1024], rel=0.1)
    assert found["sdpa", 32, 4096] - found["auto", 32, 4096] >= (2 * 4096) ** 2


@pytest.mark.parametrize("kind", ["none", "full"])
def test_activations_kept_in_fp8(kind):
    """The emulation on a CPU keeps what the GPU's kernel keeps, but for results that "selective" keeps in float32."""
    config = run_config(
        micro=ROWS, matmul_precision="fp8", activation_checkpointing=kind, width=128, layers=5, head_chunk=256
    )
    workload, layout = prepared(config, 1, torch.bfloat16)
    kept, *_ = measured(engine_of(config, VOCAB, LENGTH, torch.bfloat16), config, ROWS)
    assert planned_kept(workload, layout) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gathered", "passes", "rows", "kind"),
    [
        ("dit", False, 0, 1, "none"),
        ("dit", True, 1, 4, "full"),
        ("decoder", False, 1, 2, "full"),
        ("decoder", True, 0, 1, "none"),
    ],
)
def test_long_sequences_follow_from_shorter_ones(name, gathered, passes, rows, kind, monkeypatch):
    """What is extrapolated is what would be measured, and no trace has as many chunks of the head.

    Traces have one sequence, whose rotary table is longer than that of several: 3 % of the activations at this width.
    """
    sizes = {"width": 64, "layers": 4, "head_chunk": 256, "dropout": 0.1}
    model = run_config(kind=name, rate=float(passes), activation_checkpointing=kind, **sizes).model
    traced = []
    measure = activation_memory._measure

    def recorded(described, layers, rows, length, *options):
        traced.append(rows * length)
        return measure(described, layers, rows, length, *options)

    monkeypatch.setattr(activation_memory, "_measure", recorded)
    options = {"rows": rows, "dtype": torch.bfloat16, "gathered": gathered, "passes": passes, "trained_layers": None}
    length = 5 * activation_memory._linear_from(model) // rows + 7
    extrapolated = measure_activations(model, length=length, gpu=True, **options)
    assert max(traced) <= 2 * activation_memory._linear_from(model)
    monkeypatch.setattr(activation_memory, "_linear_from", lambda _: 10**9)
    direct = measure_activations(model, length=length, gpu=True, **options)
    for field in dataclasses.fields(direct):
        found, wanted = (getattr(one, field.name) for one in (extrapolated, direct))
        assert found == pytest.approx(wanted, rel=5e-3 if rows == 1 else 4e-2), field.name


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    ("kind", "reshard", "batches", "rate"),
    [
        ("none", False, 1, 1.0),
        ("selective", False, 1, 1.0),
        ("full", False, 1, 1.0),
        ("full", True, 1, 1.0),
        ("full", False, 2, 1.0),
        ("full", True, 2, 1.0),
        ("full", False, 1, 0.0),
    ],
)
def test_the_most_memory_of_a_sharded_step(kind, reshard, batches, rate, dtype):
    """All that rank 0 of 8 holds, within 10 %; accumulated gradients are whole, and gathered weights count."""
    ranks = 8
    config = run_config(
        "fsdp2",
        rate=rate,
        micro=1,
        batch=ranks * batches,
        fsdp={"reshard_after_estimate": reshard},
        activation_checkpointing=kind,
        width=128,
        layers=6,
        head_chunk=256,
    )
    workload, layout = prepared(config, ranks, dtype)
    with fake_ranks(ranks):
        engine = engine_of(config, VOCAB, LENGTH, dtype)
        found = sharded_peak(engine, config, batches)
    memory = rank_memory(workload, layout)
    # The averages and moments were not made here.
    other = memory.state.moments + memory.state.averages
    assert memory.peak.total - other == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_most_memory_of_a_wide_model(dtype):
    """A model whose weights outnumber the activations of a pass, within 5 %."""
    config = run_config("fsdp2", micro=1, batch=8, width=512, layers=4, head_chunk=256)
    workload, layout = prepared(config, 8, dtype)
    with fake_ranks(8):
        found = sharded_peak(engine_of(config, VOCAB, LENGTH, dtype), config, 1)
    memory = rank_memory(workload, layout)
    other = memory.state.moments + memory.state.averages
    assert memory.peak.total - other == pytest.approx(found, rel=0.05)


def sharded_peak(engine, config, batches):
    """Bytes: the shards, and the most beside them in a whole step, the second one."""
    batch = masked_batch(1, LENGTH, VOCAB)
    engine.backward(loss_of(engine, config, batch), last=True)
    engine.optimizer.zero_grad(set_to_none=True)
    shards = [parameter.to_local() for parameter in engine.trained.values()]
    bytes_ = LiveBytes([*shards, *engine.model.buffers()])
    with bytes_, following_resizes(bytes_):
        for index in range(batches):
            engine.backward(loss_of(engine, config, batch), last=index == batches - 1)
            gc.collect()
    return bytes_.peak + sum(shard.nbytes for shard in shards)


def test_accumulated_gradients_are_whole():
    config = run_config("fsdp2", micro=1, batch=16)
    workload, layout = prepared(config, 8, torch.float32)
    once, _ = prepared(run_config("fsdp2", micro=2, batch=16), 8, torch.float32)
    more = rank_memory(workload, layout).steps["head of the loss pass"].reduced
    assert more == workload.numel * 4
    assert (
        rank_memory(once, prepared(run_config("fsdp2", micro=2, batch=16), 8, torch.float32)[1])
        .steps["head of the loss pass"]
        .reduced
        == 0
    )


def test_an_offloaded_run_has_nothing_between_steps_on_the_gpu():
    config = run_config("fsdp2", batch=8, fsdp={"offload": True})
    workload, layout = prepared(config, 8, torch.bfloat16)
    memory = rank_memory(workload, layout)
    assert memory.host == memory.state.total > 0
    assert memory.peak.weights == memory.peak.moments == memory.peak.averages == 0
    assert memory.steps["update"].total == 0


def test_gathered_weights_are_bfloat16_but_for_a_float32_head():
    config = run_config("fsdp2", batch=8)
    rest = [
        gathered_weights(*prepared(run_config("fsdp2", batch=8, head_precision=head), 8, torch.bfloat16)).rest
        for head in ("compute", "float32")
    ]
    assert rest[1] == 2 * rest[0] > 0
    workload, layout = prepared(config, 8, torch.bfloat16)
    assert gathered_weights(workload, layout).blocks == sum(p.numel for u in workload.units()[1:] for p in u) * 2
