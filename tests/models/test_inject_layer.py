"""An estimate that enters at a later block: a step against a plain reference, and what runs how often."""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.utils import counters

from scmdm.config.loading import load_config
from scmdm.config.model import DENOISERS
from scmdm.config.run import RunConfig
from scmdm.diffusion.continuation import masked_nll
from scmdm.diffusion.likelihood import nelbo_terms
from scmdm.diffusion.objective import self_conditioned_nelbo, token_weights
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.errors import UserError
from scmdm.models.compilation import compile_model
from scmdm.models.initialization import init_weights
from scmdm.models.lora import add_adapters, freeze
from scmdm.models.model_files import spec_of
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from scmdm.planner.activation_memory import LiveBytes
from scmdm.system.process_group import World
from scmdm.training.setup import resolve_engine
from tests.planner.measuring import engine_of, loss_of, masked_batch, run_config

VOCAB, MASK, LENGTH, LAYERS, INJECTED = 12, 11, 12, 4, 3
DIT = {"kind": "dit", "condition_width": 8}
DECODER = {"kind": "decoder", "kv_heads": 1, "logit_shift": True, "embedding_multiplier": 3.0}


def make(block_length=None, seed=0, **keys):
    """A model whose weights are all different from zero."""
    given = {
        "width": 16,
        "layers": LAYERS,
        "heads": 2,
        "inject_layer": INJECTED,
        **(keys if "kind" in keys else DIT | keys),
    }
    config = DENOISERS.schema(given["kind"])(**{"self_conditioned": True, **given})
    model = DENOISERS.load(config.kind)(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    model.block_length = block_length
    if config.lora_rank:
        add_adapters(model.blocks, config)
    init_weights(model, seed)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def make_batch(rows=6, rate=1.0, documents=None, block_length=None, rollout_steps=0):
    x = torch.randint(0, MASK, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = None if documents is None else torch.tensor(documents).expand(rows, -1)
    sequences = Sequences(x, torch.ones_like(x).bool(), torch.arange(rows), documents)
    t = torch.linspace(0.2, 1, rows).double()
    options = {"schedule": LogLinear(), "mask_id": MASK, "seed": 0, "step": 0}
    return noise_batch(sequences, t, rate=rate, rollout_steps=rollout_steps, block_length=block_length, **options)


def step(model, batch, *, share, **options):
    """Loss and gradients of a step, on weights without earlier gradients."""
    model.zero_grad()
    loss = self_conditioned_nelbo(model, batch, LogLinear(), condition=True, share_lower=share, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def positions(packing):
    return None if packing is None else packing.positions_BL


def reference(model, batch, passes=1):
    """Loss of dense passes over all blocks, each written out, with `p @ E` from all logits."""
    masked, state = batch.z == MASK, State(batch.z, batch.t, None, batch.packing, batch.labels, batch.clean)
    inputs, one_hot = model._block_inputs(state, False), torch.nn.functional.one_hot(batch.z, VOCAB).float()
    scale = getattr(model.config, "embedding_multiplier", 1.0)

    def log_probabilities(estimate):
        copies = [model.vocab_embed.embedding[ids] for ids in (batch.z, batch.clean) if ids is not None]
        x = scale * torch.cat(copies, 1)
        for number, block in enumerate(model.blocks):
            if number == INJECTED and estimate is not None:
                term = torch.zeros_like(x)
                term[:, :LENGTH] = scale * model.conditioner(estimate)
                x = x + term
            x = block(x, inputs.rotary, *inputs.condition, False, inputs.masks)
        h = model.output_layer(x, *inputs.condition)
        h = model._align(h[:, :LENGTH], positions(batch.packing), None if batch.clean is None else h[:, LENGTH:])
        weight, bias = model.head()
        logits = h @ weight.T + (0 if bias is None else bias)
        return torch.cat([logits[..., :MASK], torch.full_like(logits[..., MASK:], -torch.inf)], -1).log_softmax(-1)

    estimate = None
    with torch.no_grad():
        for _ in range(passes):
            p = torch.where(masked[..., None], log_probabilities(estimate).exp(), one_hot)
            estimate = p @ model.vocab_embed.embedding
    estimate = torch.where(batch.conditioned[:, None, None], estimate, 0)
    log_p = log_probabilities(estimate).gather(2, batch.x[..., None]).squeeze(2)
    return -(log_p * masked * token_weights(batch, LogLinear())).sum()


CASES = [
    (DIT, {}, {}),
    (DIT, {"conditioner": "norm"}, {"rate": 0.5}),
    (DIT, {"conditioner": "mlp", "activation_checkpointing": "full"}, {}),
    (DIT, {"activation_checkpointing": "selective"}, {"documents": [0] * 5 + [1] * 3 + [2] * 4}),
    (DIT, {}, {"block_length": 4}),
    (DIT, {"lora_rank": 2}, {}),
    (DECODER, {}, {}),
    (DECODER, {"tied": True}, {"block_length": 3}),
    (DECODER, {}, {"documents": [0] * 7 + [1] * 5}),
]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("kind", "keys", "batch"), CASES, ids=str)
def test_a_step_with_shared_blocks_is_the_plain_one(kind, keys, batch, passes):
    model = make(block_length=batch.get("block_length"), **kind, **keys)
    config = RunConfig(model=model.config)
    freeze(model, config)
    batch = make_batch(**batch)
    loss, gradients = step(model, batch, share=True, passes=passes)
    model.zero_grad()
    plain = reference(model, batch, passes)
    plain.backward()
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
    assert gradients.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_sharing_changes_cost_alone(stop_gradient, rate):
    model, batch = make(), make_batch(rate=rate)
    shared, separate = (step(model, batch, share=share, stop_gradient=stop_gradient) for share in (True, False))
    torch.testing.assert_close(shared[0], separate[0], rtol=1e-6, atol=0)
    for name, gradient in separate[1].items():
        torch.testing.assert_close(shared[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def calls_of_blocks(model, run):
    """How often each block ran, and with gradients, outside of a backward pass."""
    calls, hooks = [[] for _ in model.blocks], []
    for own, block in zip(calls, model.blocks, strict=True):
        hooks.append(block.register_forward_pre_hook(lambda *_, own=own: own.append(torch.is_grad_enabled())))
    run()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("passes", [1, 2])
def test_lower_blocks_run_once_with_gradient(passes):
    model, batch = make(), make_batch()

    def run(share):
        self_conditioned_nelbo(model, batch, LogLinear(), condition=True, passes=passes, share_lower=share)

    both = [False] * passes + [True]
    assert calls_of_blocks(model, lambda: run(True)) == [[True]] * INJECTED + [both] * (LAYERS - INJECTED)
    assert calls_of_blocks(model, lambda: run(False)) == [both] * LAYERS


def test_likelihoods_share_them_too():
    model, batch = make().eval(), make_batch()
    sequences = Sequences(batch.x, batch.valid, torch.arange(len(batch.x)))
    own = {"mask_id": MASK, "seed": 0, "t_min": 1e-3, "condition": True}
    calls = calls_of_blocks(model, lambda: nelbo_terms(model, [sequences], LogLinear(), **own))
    assert [len(block) for block in calls] == [1] * INJECTED + [2] * (LAYERS - INJECTED)
    masked, share = batch.z == MASK, torch.full((len(batch.x),), 0.5).double()

    def run():
        options = {"schedule": LogLinear(), "mask_id": MASK, "condition": True}
        return masked_nll(model, batch.x, masked, masked.double(), share, **options)

    assert [len(block) for block in calls_of_blocks(model, run)] == [1] * INJECTED + [2] * (LAYERS - INJECTED)
    found = run()
    model.lower = lambda *_, **__: None
    torch.testing.assert_close(run(), found)


def test_both_passes_share_the_dropout_of_the_lower_blocks():
    """Pass 1 sees the lower blocks as pass 2 does, with dropout; the upper blocks draw their own."""
    model, batch = make(dropout=0.5).train(), make_batch()
    lower = []
    for name in ("estimate", "weighted_nll"):
        method = getattr(model, name)

        def noted(state, *args, method=method, **options):
            lower.append(state.lower.x_BLD)
            return method(state, *args, **options)

        setattr(model, name, noted)
    step(model, batch, share=True)
    assert torch.equal(lower[0], lower[1]) and lower[1].requires_grad and not lower[0].requires_grad
    plain = model.lower(State(batch.z, batch.t))
    assert not torch.allclose(lower[0], plain)


def test_passes_that_differ_share_nothing():
    keys = ["run_dir=r", "data.path=d", "train.steps=1", "model.inject_layer=3", "self_conditioning.rate=1"]

    def shared(*more):
        return load_config(RunConfig, None, [*keys, *more]).shared_layers

    assert shared() == shared("model.dropout=0.1") == 3
    assert shared("self_conditioning.estimate_dropout=false") == 3  # there is none
    assert shared("self_conditioning.rollout_steps=1") == 0
    assert shared("self_conditioning.estimate_dropout=false", "model.dropout=0.1") == 0
    assert shared("self_conditioning.rate=0") == 0
    with pytest.raises(AssertionError):
        step(make(), make_batch(rollout_steps=1), share=True)


@pytest.mark.parametrize("kind", [DIT, DECODER], ids=["dit", "decoder"])
@pytest.mark.parametrize("conditioner", ["projection", "norm", "mlp"])
def test_a_fresh_conditioner_is_neutral_bitwise_and_has_a_gradient(kind, conditioner):
    model, batch = make(**kind, conditioner=conditioner), make_batch()
    factor = {"projection": "proj.weight", "norm": "gain", "mlp": "out.weight"}[conditioner]
    with torch.no_grad():
        model.conditioner.get_parameter(factor).zero_()
    state = State(batch.z, batch.t)
    seen = dataclasses.replace(state, estimate_BLD=model.estimate(state))
    assert torch.equal(model.hidden(seen), model.hidden(state))
    _, gradients = step(model, batch, share=True)
    assert float(gradients[f"conditioner.{factor}"].abs().sum()) > 0


def test_an_evaluation_of_a_sampler_runs_every_block_once():
    """The estimate changes what the upper blocks see, and a recorded graph has both."""
    model, batch = make().eval(), make_batch()
    state = State(batch.z, batch.t)
    seen = dataclasses.replace(state, estimate_BLD=model.estimate(state))
    with torch.no_grad():
        assert calls_of_blocks(model, lambda: model.hidden(seen)) == [[False]] * LAYERS
        inputs = []
        hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
        whole, null = model.hidden(seen), model.hidden(state)
        for hook in hooks:
            hook.remove()
        same = [torch.equal(a, b) for a, b in zip(inputs[:LAYERS], inputs[LAYERS:], strict=True)]
        assert same == [True] * INJECTED + [False] * (LAYERS - INJECTED)
        assert not torch.allclose(whole, null)
        replayed = ReplayedDenoiser(model, lambda function: function)
        for _ in range(4):
            assert torch.equal(replayed.hidden(seen), whole)
        assert len(replayed.recorded) == 1


@pytest.mark.parametrize("inject_layer", [0, 3])
def test_an_adaptation_step_needs_no_more_memory_than_a_plain_one(inject_layer):
    """Peak bytes of both passes and the backward pass, gradients included; within 2 %."""
    peaks = []
    for rate in (0.0, 1.0):
        keys = {"width": 64, "layers": 6, "inject_layer": inject_layer if rate else 0}
        config = run_config(rate=rate, micro=16, **keys)
        engine = engine_of(config, 600, 64)
        engine.model.train()
        batch = masked_batch(16, 64, 600)
        with LiveBytes([*engine.model.parameters(), *engine.model.buffers()]) as bytes_:
            engine.backward(loss_of(engine, config, batch), last=True)
        peaks.append(bytes_.peak)
    assert peaks[1] <= 1.02 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "graphs"), [("trunk", 3), ("block", 4)])
def test_compiled_blocks_compute_the_same(what, graphs, monkeypatch):
    """trunk: lower blocks, and upper ones with and without gradient; block: likewise for the first and other inputs."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, batch = make(), make_batch()
    wanted = step(model, batch, share=True)
    counters.clear()
    if what == "block":
        for block in model.blocks:
            block.compile(backend="aot_eager")
    else:
        compile_model(model, what)
    found = step(model, batch, share=True)
    assert counters["stats"]["unique_graphs"] <= graphs and not counters["graph_break"]
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_last_layers_alone_run_backward():
    """Frozen blocks below the estimate have no gradient to pass on."""
    model, batch = make(inject_layer=2), make_batch()
    config = RunConfig(model=model.config)
    config.train.last_layers = 1
    freeze(model, config)
    lower = model.lower(State(batch.z, batch.t))
    assert not lower.requires_grad
    _, gradients = step(model, batch, share=True)
    assert {name.split(".")[0] for name in gradients} == {"blocks", "conditioner"}
    assert all(name.startswith("blocks.3.") for name in gradients if name.startswith("blocks"))


def test_a_block_that_does_not_exist_is_refused_and_old_descriptions_enter_at_the_input():
    content = {
        "model": dataclasses.asdict(make().config),
        "diffusion": {"schedule": "log_linear"},
        "vocab_size": VOCAB,
        "mask_id": MASK,
        "length": LENGTH,
    }
    assert spec_of(content, "here").model.inject_layer == INJECTED
    with pytest.raises(UserError, match=r"model\.inject_layer"):
        spec_of({**content, "model": {**content["model"], "inject_layer": LAYERS}}, "here")
    del content["model"]["inject_layer"]
    assert spec_of(content, "here").build().inject_layer == 0


def test_a_plain_model_has_nothing_to_share():
    model, batch = make(self_conditioned=False), make_batch()
    assert model.inject_layer == 0 and model.lower(State(batch.z, batch.t)) is None
    config = RunConfig(model=dataclasses.replace(model.config, compile="trunk"))
    assert resolve_engine(config, World(0, 1, 0)).shared_layers == 0
