"""The residual stream in the dtype of compute and products in FP8: a step's loss and gradients against float32."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from scmdm.config.run import RunConfig
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.distributed.engine import check_hardware
from scmdm.errors import UserError
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.dit import DiTConfig
from scmdm.models.linear import Linear
from scmdm.models.model_files import ModelSpec
from scmdm.ops.fp8 import multiply_emulated
from scmdm.planner.activation_memory import LiveBytes
from scmdm.training.optimizer import set_lr
from scmdm.training.setup import build_engine
from scmdm.training.step import train_step

VOCAB, MASK, LENGTH, BATCH = 50, 49, 32, 8
SIZES = {"width": 64, "layers": 3, "heads": 4, "self_conditioned": True}
DIT, DECODER = DiTConfig(**SIZES, condition_width=8), DecoderConfig(**SIZES, kv_heads=2, mlp_width=96)
MODELS = pytest.mark.parametrize("model", [DIT, DECODER], ids=["dit", "decoder"])


def engine_of(model, dtype, name="single"):
    """An engine whose parameters are all drawn, and its configuration."""
    config = RunConfig(engine=name, model=model)
    config.train.global_batch_size, config.train.micro_batch_size = BATCH, BATCH // 2
    config.self_conditioning.rate = 1.0
    spec = ModelSpec(model, config.diffusion, VOCAB, MASK, LENGTH)
    engine = build_engine(config, spec, None, torch.device("cpu"), dtype)
    for name, parameter in engine.model.named_parameters():
        # A product of lengths, because the names of a model differ in few letters.
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
        value = 0.08 * drawn + (1.0 if "norm" in name else 0.0)
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).data.copy_(value)
    engine.model.train()
    set_lr(engine.optimizer, 1.0)
    return engine, config


def step_of(model, dtype=torch.bfloat16, name="single"):
    """Loss and gradients of an adaptation step in two micro-batches."""
    engine, config = engine_of(model, dtype, name)
    found = {}
    clip = engine.clip_grad_norm

    def clip_and_copy(*arguments):
        gradients = {n: p.grad for n, p in engine.trained.items() if p.grad is not None}
        found.update({n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in gradients.items()})
        return clip(*arguments)

    engine.clip_grad_norm = clip_and_copy
    tokens = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH).remainder(MASK)
    sequences = Sequences(tokens, torch.ones_like(tokens).bool(), torch.arange(BATCH))
    return train_step(engine, config, LogLinear(), MASK, sequences, 0).loss, found


def difference(found, wanted):
    """Relative difference of the losses, and that of all gradients together."""
    (loss, gradients), (other, others) = found, wanted
    assert gradients.keys() == others.keys()
    apart = sum((gradients[name] - others[name]).square().sum() for name in others)
    return abs(loss / other - 1), float((apart / sum(g.square().sum() for g in others.values())).sqrt())


@MODELS
def test_a_narrow_residual_stream_is_as_close_as_bfloat16_is(model):
    """Against float32; a stream in float32 between products in bfloat16 is the measure."""
    exact = step_of(model, torch.float32)
    usual = difference(step_of(model), exact)
    narrow = difference(step_of(dataclasses.replace(model, residual_precision="compute")), exact)
    assert narrow[0] < 0.01 and narrow[1] < max(2 * usual[1], 0.03)


@MODELS
@pytest.mark.parametrize("keys", [{}, {"lora_rank": 4}, {"activation_checkpointing": "full"}], ids=str)
def test_products_in_fp8_lose_no_more_than_their_bits(model, keys):
    model = dataclasses.replace(model, **keys)
    exact = step_of(model, torch.float32)
    usual = difference(step_of(model), exact)
    loss, gradients = difference(step_of(dataclasses.replace(model, matmul_precision="fp8")), exact)
    assert loss < 0.02 and 2 * usual[1] < gradients < 2**5 * usual[1], "e4m3 has 3 bits, bfloat16 has 8"


@MODELS
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_changes_nothing(model, kind):
    """A narrow stream is cast twice, and FP8 quantized twice: both are the same each time."""
    model = dataclasses.replace(model, residual_precision="compute", matmul_precision="fp8")
    loss, gradients = step_of(model)
    other, others = step_of(dataclasses.replace(model, activation_checkpointing=kind))
    assert loss == other and all(torch.equal(gradients[name], others[name]) for name in others)


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["none", "full"])
def test_fsdp2_multiplies_gathered_weights_in_fp8(kind, alone):
    """Which it frees after a block and gathers again for the backward pass, as for other linear maps."""
    model = dataclasses.replace(DECODER, matmul_precision="fp8", activation_checkpointing=kind)
    loss, gradients = difference(step_of(model, torch.float32, "fsdp2"), step_of(model, torch.float32))
    assert loss < 1e-6 and gradients < 1e-5


@MODELS
def test_in_float32_the_stream_is_the_same_bitwise(model):
    (loss, gradients), (other, others) = (
        step_of(dataclasses.replace(model, residual_precision=kind), torch.float32) for kind in ("float32", "compute")
    )
    assert loss == other and all(torch.equal(gradients[name], others[name]) for name in others)


@MODELS
@pytest.mark.parametrize("kind", ["float32", "compute"])
def test_the_stream_has_its_dtype_and_norms_and_weights_are_float32(model, kind):
    engine, _ = engine_of(dataclasses.replace(model, residual_precision=kind), torch.bfloat16)
    seen, norms = [], []
    for block in engine.model.blocks:
        block.register_forward_hook(lambda _module, inputs, out: seen.extend((inputs[0].dtype, out.dtype)))
        block.norm2.register_forward_hook(lambda _module, _inputs, out: norms.append(out.dtype))
    with engine.compute():
        engine.model.hidden(State(torch.zeros((2, LENGTH), dtype=torch.int64), torch.rand(2).double()))
    assert set(seen) == {torch.bfloat16 if kind == "compute" else torch.float32} and set(norms) == {torch.float32}
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.float32}


@MODELS
def test_a_narrow_stream_keeps_fewer_bytes(model):
    """Two bytes for each element of the stream and of what a norm reads, not four."""
    kept = {}
    for kind in ("float32", "compute"):
        engine, _ = engine_of(dataclasses.replace(model, residual_precision=kind), torch.bfloat16)
        state = State(torch.zeros((4, 64), dtype=torch.int64), torch.rand(4).double())
        with LiveBytes(engine.model.parameters()) as bytes_, engine.compute():
            hidden = engine.model.hidden(state)
            kept[kind] = bytes_.live
        assert hidden.requires_grad
    assert kept["float32"] - kept["compute"] >= 2 * 2 * model.layers * 4 * 64 * model.width


def test_fp8_is_for_training_and_for_linear_maps_of_blocks():
    """Sampling and evaluation build a model without it; output head, embedding and conditions keep their dtype."""
    model = dataclasses.replace(DIT, matmul_precision="fp8", lora_rank=2)
    engine, config = engine_of(model, torch.bfloat16)
    switched = {name for name, module in engine.model.named_modules() if getattr(module, "fp8", None) is not None}
    maps = ("attn_qkv", "attn_out", "mlp.0", "mlp.2")
    assert switched == {f"blocks.{layer}.{name}" for layer in range(model.layers) for name in maps}
    assert engine.model.blocks[0].attn_qkv.fp8 is multiply_emulated
    built = ModelSpec(model, config.diffusion, VOCAB, MASK, LENGTH).build()
    assert all(module.fp8 is None for module in built.modules() if isinstance(module, Linear))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have products in FP8")
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_fp8_without_a_gpu_is_refused(precision):
    config = RunConfig(device="cpu", precision=precision, model=dataclasses.replace(DIT, matmul_precision="fp8"))
    with pytest.raises(UserError, match=r"model\.matmul_precision=fp8"):
        check_hardware(config)
