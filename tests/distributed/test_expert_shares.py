"""What a rank holds with expert parallelism, on ranks that do not exist: never all experts of a layer."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks.counting import fake_ranks
from scmdm.config.model import ModelConfig
from scmdm.config.run import RunConfig
from scmdm.distributed.ema import Ema
from scmdm.errors import UserError
from scmdm.models import initialization
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.experts.expert_block import whole_parameters
from scmdm.models.experts.expert_parallel import expert_ranks_refused
from scmdm.models.network import count_parameters
from scmdm.models.tensor_files import _box, local_part
from tests.planner.measuring import engine_of, run_config, storage_bytes
from tests.scale.test_true_size import Storages

VOCAB, LENGTH = 19, 8
MODEL = {"kind": "decoder", "width": 16, "layers": 2, "heads": 4, "mlp_width": 16, "experts": 8, "experts_per_token": 2}
ROUTED = (".experts.gate.", ".experts.up.", ".experts.down.")


def sharded(ranks, **fsdp):
    return run_config("fsdp2", batch=ranks, fsdp=fsdp, **MODEL)


def routed(values):
    return {name: value for name, value in values.items() if any(part in name for part in ROUTED)}


@pytest.mark.parametrize(
    ("ranks", "experts", "replicate", "rank", "first", "last"),
    [
        (4, 2, 1, 0, 0, 2),
        (4, 2, 1, 1, 4, 6),
        (4, 2, 1, 2, 2, 4),
        (4, 4, 1, 3, 6, 8),
        (8, 2, 2, 7, 6, 8),
        (16, 4, 1, 5, 3, 4),  # of four ranks that hold two experts, two hold none
        (16, 4, 1, 13, 4, 4),
    ],
)
def test_a_rank_holds_its_experts_as_one_process_draws_them(ranks, experts, replicate, rank, first, last):
    """Weights, averages and moments of a part of the experts alone."""
    config = run_config("single", **MODEL)
    single = engine_of(config, VOCAB, LENGTH)
    expected = routed(single.parameters())
    with fake_ranks(ranks, rank):
        engine = engine_of(sharded(ranks, experts=experts, replicate=replicate), VOCAB, LENGTH)
        held, packed = routed(engine.parameters()), routed(engine.pack(engine.parameters()))
        averages = routed(Ema(engine, config.ema).average)
        moments = [routed(found) for found in engine.moments().values()]
        assert count_parameters(engine.model) == count_parameters(single.model)
        for name, value in packed.items():
            assert isinstance(value, DTensor) and value.shape == expected[name].shape
            assert torch.equal(local_part(value), expected[name][first:last]), name
            if last > first:  # what is written and read
                assert _box(name, value) == ([first, 0, 0], [last, *value.shape[1:]])
    part = sum(value.nbytes for value in expected.values()) * (last - first) // 8
    assert all(sum(local_part(x).nbytes for x in found.values()) == part for found in (held, averages, *moments))


def test_no_rank_draws_a_whole_layer(monkeypatch):
    """The peak of storages while a model is built: what the rank holds, and pieces of draws."""
    piece = 2**10
    monkeypatch.setattr(initialization, "_DRAWN_AT_ONCE", piece)
    config = sharded(8, experts=4)
    config.model.expert_width = 512
    with fake_ranks(8, 5), Storages(0) as opening:
        engine = engine_of(config, VOCAB, LENGTH)
        held = storage_bytes(engine.parameters().values())
    layer = 3 * 8 * 16 * 512 * 4
    assert held <= opening.peak < held + 4 * 4 * piece < layer


def test_names_and_shapes_are_those_of_one_process():
    single = engine_of(run_config("single", **MODEL), VOCAB, LENGTH)
    with fake_ranks(4):
        engine = engine_of(run_config("fsdp2", batch=4, fsdp={"experts": 4}, **MODEL, lora_rank=2), VOCAB, LENGTH)
        found = {name: value.shape for name, value in whole_parameters(engine.model).items()}
        assert routed(engine.frozen()).keys() == {name for name in routed(found) if ".lora_" not in name}
    assert {name: shape for name, shape in found.items() if ".lora_" not in name} == {
        name: value.shape for name, value in single.parameters().items()
    }


@pytest.mark.parametrize(
    ("model", "experts", "refused"),
    [
        (DecoderConfig(experts=8), 1, False),
        (DecoderConfig(experts=8), 4, False),
        (DecoderConfig(experts=8), 3, True),
        (DecoderConfig(experts=8), 16, True),
        (DecoderConfig(), 2, True),
        (ModelConfig(), 2, True),
    ],
)
def test_experts_are_divided_equally(model, experts, refused):
    assert (expert_ranks_refused(model, experts) is not None) == refused


@pytest.mark.parametrize(("size", "replicate", "possible"), [(4, 1, True), (2, 1, False), (8, 2, True), (4, 2, False)])
def test_the_ranks_of_a_replica_are_divided_equally(size, replicate, possible):
    config = RunConfig(run_dir="unused", engine="fsdp2")
    config.fsdp.experts, config.fsdp.replicate, config.train.micro_batch_size = 4, replicate, 1
    if possible:
        config.check_ranks(size)
        return
    with pytest.raises(UserError, match=r"fsdp\.experts"):
        config.check_ranks(size)
