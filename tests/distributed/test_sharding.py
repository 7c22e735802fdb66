"""FSDP2 on one rank of a fake process group."""

import subprocess
import sys

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks.counting import fake_ranks
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.run import RunConfig
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.state import Sequences
from scmdm.models.dit import DiTConfig
from scmdm.models.model_files import ModelSpec
from scmdm.training.setup import build_engine
from tests.distributed.collectives import CollectiveCounter

CPU = torch.device("cpu")
LAYERS, VOCAB = 4, 12


@pytest.fixture
def ranks(request):
    """Make this process rank 0 of a fake process group of that size."""
    with fake_ranks(request.param):
        yield request.param


def engine_of(dtype=torch.float32, rate=1.0, reshard=False, **model):
    config = RunConfig(run_dir="unused", engine="fsdp2")
    config.model = DiTConfig(
        width=16, layers=LAYERS, heads=2, condition_width=8, self_conditioned=rate > 0, head_chunk=64, **model
    )
    config.fsdp.reshard_after_estimate = reshard
    return build_engine(config, ModelSpec(config.model, DiffusionConfig(), VOCAB, VOCAB - 1, 8), None, CPU, dtype)


def step(engine, rate=1.0):
    schedule = engine.model.schedule
    x = torch.randint(0, VOCAB - 1, (4, 8))
    draws = {"schedule": schedule, "mask_id": VOCAB - 1, "seed": 0, "step": 0, "rate": rate}
    batch = noise_batch(
        Sequences(x, torch.ones_like(x).bool(), torch.arange(4)), torch.full((4,), 0.5).double(), **draws
    )
    with engine.compute():
        output = self_conditioned_nelbo(engine.denoiser, batch, schedule, condition=rate > 0)
    engine.backward(output.loss, last=True)


@pytest.mark.parametrize(
    ("rate", "reshard", "gathers"),
    [(0.0, False, 1 + 2 * LAYERS), (1.0, False, 1 + 2 * LAYERS), (1.0, True, 1 + 3 * LAYERS)],
)
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_the_estimate_pass_gathers_nothing_extra_by_default(rate, reshard, gathers, ranks):
    """The root is gathered once; each block once for both forward passes, and once for the backward pass."""
    engine = engine_of(rate=rate, reshard=reshard)
    for _ in range(2):
        with CollectiveCounter() as counter:
            step(engine, rate)
        assert counter.number["_allgather_base_"] == gathers
        engine.step(torch.tensor(False))


@pytest.mark.parametrize("head", ["float32", "compute"])
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_bfloat16_keeps_the_residual_stream_and_a_float32_head(head, ranks):
    engine, seen = engine_of(torch.bfloat16, head_precision=head), {}
    model = engine.model
    model.blocks[1].register_forward_hook(lambda _m, arguments, out: seen.update(x=arguments[0].dtype, y=out.dtype))
    linear = model.blocks[1].mlp[0]
    linear.register_forward_hook(lambda m, _arguments, out: seen.update(weight=m.weight.dtype, product=out.dtype))
    as_it_was = model._head_input

    def watched(h):
        seen["head"] = as_it_was(h)
        return seen["head"]

    model._head_input = watched
    step(engine)
    assert (seen["x"], seen["y"]) == (torch.float32, torch.float32)
    assert (seen["weight"], seen["product"]) == (torch.bfloat16, torch.bfloat16)
    assert seen["head"].dtype == (torch.float32 if head == "float32" else torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in engine.parameters().values())


@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_new_shards_equal_slices_of_the_weights_of_one_process(ranks):
    sharded = engine_of().parameters()
    whole = engine_of_one().parameters()
    assert sharded.keys() == whole.keys()
    for name, value in sharded.items():
        assert isinstance(value, DTensor)
        assert torch.equal(value.to_local(), whole[name].chunk(ranks)[0]), name


def engine_of_one():
    config = RunConfig(run_dir="unused", engine="single")
    config.model = DiTConfig(width=16, layers=LAYERS, heads=2, condition_width=8, self_conditioned=True)
    spec = ModelSpec(config.model, DiffusionConfig(), VOCAB, VOCAB - 1, 8)
    return build_engine(config, spec, None, CPU, torch.float32)


_MEMORY = """
import resource, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from scmdm.config.diffusion import DiffusionConfig
from scmdm.config.run import RunConfig
from scmdm.models.dit import DiTConfig
from scmdm.models.network import count_parameters
from scmdm.models.model_files import ModelSpec
from scmdm.training.setup import build_engine
from tests.distributed.collectives import CollectiveCounter

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
config = RunConfig(run_dir="unused", engine="fsdp2")
config.model = DiTConfig(width=1024, layers=12, heads=16)
spec = ModelSpec(config.model, DiffusionConfig(), 64, 63, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
engine = build_engine(config, spec, None, torch.device("cpu"), torch.float32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, count_parameters(engine.model) * 4 / 2**20)
"""


def test_no_rank_ever_holds_a_whole_model():
    """Each of 64 ranks holds its own part and one parameter at a time (MiB)."""
    output = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True).stdout
    grown, whole = map(float, output.split()[-2:])
    assert whole > 500
    assert grown < 0.25 * whole
