"""What is carried and how it is mixed: a step against a plain reference, neutrality, and what samplers carry."""

import dataclasses
import itertools

import pytest
import torch

from scmdm.config.loading import load_config
from scmdm.config.run import RunConfig
from scmdm.diffusion.guidance import Guided
from scmdm.diffusion.objective import token_weights
from scmdm.diffusion.reveal_order import SamplerSettings
from scmdm.diffusion.sampler import sample
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import State
from scmdm.errors import UserError
from scmdm.models.initialization import init_weights
from scmdm.models.lora import freeze, is_added
from scmdm.ops.cuda_graphs import ReplayedDenoiser
from tests.models.test_inject_layer import DECODER, DIT, LENGTH, MASK, VOCAB, make, make_batch, step

HIDDEN = {"carried": "hidden", "conditioner": "norm"}
ENTROPY = {"mixing": "interpolated"}
TOP1 = {"mixing": "interpolated", "confidence": "top1"}
KEYS = ["run_dir=r", "data.path=d", "train.steps=1", "self_conditioning.rate=1"]


def dense_carried(model, h, z):
    """What is carried, from all logits of all positions: a tensor, and the confidence of each position."""
    config, masked = model.config, z == MASK
    if config.carried == "hidden":
        return h, None
    weight, bias = model.head()
    logits = (h @ weight.T + (0 if bias is None else bias))[..., :MASK] / config.estimate_temperature
    p = logits.softmax(-1)
    q = p
    if config.estimate_top_k is not None:
        q = p * (p >= p.topk(config.estimate_top_k).values[..., -1:])
        q = q / q.sum(-1, keepdim=True)
    embedding = model.vocab_embed.embedding
    estimate = torch.where(masked[..., None], q @ embedding[:MASK], embedding[z])
    confidence = p.amax(-1)
    if config.confidence == "entropy":
        confidence = 1 + (p * p.log()).sum(-1) / torch.tensor(float(VOCAB - 1)).log()
    return estimate, confidence


def dense_hidden(model, state, carried):
    """Hidden states of an evaluation, block after block."""
    config, inputs = model.config, model._block_inputs(state, False)
    scale, masked = getattr(config, "embedding_multiplier", 1.0), (state.z_BL == MASK)[..., None]
    copies = [model.vocab_embed.embedding[ids] for ids in (state.z_BL, state.clean_BL) if ids is not None]
    x = scale * torch.cat(copies, 1)
    for number, block in enumerate(model.blocks):
        if number == config.inject_layer and carried is not None:
            estimate, confidence, given = carried
            if config.mixing == "added":
                term = scale * model.conditioner(estimate)
            else:
                own = model.conditioner
                share = own.strength * torch.sigmoid(own.slope * (confidence[..., None] - own.threshold))
                term = torch.where(masked, share * scale * (estimate - model.vocab_embed.embedding[MASK]), 0)
            term = torch.where(given[:, None, None], term, 0)
            x = torch.cat([x[:, :LENGTH] + term, x[:, LENGTH:]], 1)
        x = block(x, inputs.rotary, *inputs.condition, False, inputs.masks)
    h = model.output_layer(x, *inputs.condition)
    positions = None if state.packing is None else state.packing.positions_BL
    return model._align(h[:, :LENGTH], positions, None if state.clean_BL is None else h[:, LENGTH:])


def dense_nll(model, h, batch):
    weight, bias = model.head()
    logits = (h @ weight.T + (0 if bias is None else bias))[..., :MASK]
    log_p = logits.log_softmax(-1).gather(2, batch.x[..., None]).squeeze(2)
    return -(log_p * (batch.z == MASK) * token_weights(batch, LogLinear())).sum()


def reference(model, batch, passes=1, stop_gradient=True):
    state = State(batch.z, batch.t, None, batch.packing, batch.labels, batch.clean)
    carried, everyone = None, torch.ones_like(batch.conditioned)
    with torch.set_grad_enabled(not stop_gradient):
        for _ in range(passes):
            estimate, confidence = dense_carried(model, dense_hidden(model, state, carried), batch.z)
            carried = estimate, confidence, everyone
    return dense_nll(model, dense_hidden(model, state, (estimate, confidence, batch.conditioned)), batch)


CASES = [
    (DIT, HIDDEN, {}),
    (DIT, {"carried": "hidden"}, {"rate": 0.5}),
    (DIT, HIDDEN | {"inject_layer": 2, "activation_checkpointing": "full"}, {}),
    (DIT, HIDDEN, {"block_length": 4}),
    (DECODER, HIDDEN | {"inject_at": "all", "conditioner": "mlp"}, {"documents": [0] * 7 + [1] * 5}),
    (DIT, ENTROPY, {}),
    (DIT, TOP1 | {"estimate_top_k": 3}, {"rate": 0.5}),
    (DIT, ENTROPY | {"estimate_top_k": 2, "estimate_temperature": 0.5}, {"block_length": 4}),
    (DIT, ENTROPY | {"lora_rank": 2}, {"documents": [0] * 5 + [1] * 3 + [2] * 4}),
    (DECODER, TOP1 | {"tied": True, "estimate_temperature": 2.0}, {"block_length": 3}),
]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("kind", "keys", "batch"), CASES, ids=str)
def test_a_step_is_the_plain_one(kind, keys, batch, passes):
    keys = {"inject_layer": 0, **keys}
    model = make(block_length=batch.get("block_length"), **kind, **keys)
    freeze(model, RunConfig(model=model.config))
    batch = make_batch(**batch)
    loss, gradients = step(model, batch, share=bool(keys["inject_layer"]), passes=passes)
    model.zero_grad()
    plain = reference(model, batch, passes)
    plain.backward()
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("keys", [HIDDEN, ENTROPY, TOP1, TOP1 | {"estimate_top_k": 3}], ids=str)
def test_a_gradient_through_what_is_carried_is_that_of_the_plain_step(keys):
    model, batch = make(inject_layer=0, **keys), make_batch()
    loss, gradients = step(model, batch, share=False, stop_gradient=False)
    model.zero_grad()
    plain = reference(model, batch, stop_gradient=False)
    plain.backward()
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("keys", "zero"), [(HIDDEN, "gain"), (ENTROPY, "strength"), (TOP1, "strength")], ids=str)
@pytest.mark.parametrize("kind", [DIT, DECODER], ids=["dit", "decoder"])
def test_an_adapted_model_is_its_base_bitwise_and_has_a_gradient(kind, keys, zero):
    model, batch = make(inject_layer=0, **kind, **keys), make_batch()
    init_weights(model, 0, only=is_added)
    state = State(batch.z, batch.t)
    seen = dataclasses.replace(state, estimate_BLD=model.estimate(state))
    assert torch.equal(model.hidden(seen), model.hidden(state))
    _, gradients = step(model, batch, share=False)
    assert {n for n, g in gradients.items() if n.startswith("conditioner.") and g.abs().sum() > 0} == {
        f"conditioner.{zero}"
    }


@pytest.mark.parametrize("keys", [HIDDEN, ENTROPY, TOP1], ids=str)
def test_zeros_are_the_null_estimate(keys):
    model, batch = make(inject_layer=0, **keys), make_batch()
    state = State(batch.z, batch.t)
    null = dataclasses.replace(state, estimate_BLD=torch.zeros_like(model.estimate(state)))
    assert torch.equal(model.hidden(null), model.hidden(state))


@pytest.mark.parametrize("keys", [HIDDEN, ENTROPY, TOP1 | {"estimate_top_k": 2}], ids=str)
@pytest.mark.parametrize("replayed", [False, True])
def test_sampling_carries_what_training_saw_at_no_further_evaluation(keys, replayed):
    model, seen = make(inject_layer=0, **keys).eval(), []
    hidden = model.hidden

    def record(state):
        seen.append(state)
        return hidden(state)

    model.hidden = record
    denoiser = ReplayedDenoiser(model, lambda function: function) if replayed else model
    options = {"schedule": LogLinear(), "settings": SamplerSettings(steps=3, carry=True), "mask_id": MASK, "seed": 0}
    drawn = sample(denoiser, torch.full((4, LENGTH), MASK), torch.arange(4), **options)
    model.hidden = hidden
    assert drawn.evaluations == 3 == len(seen)
    for before, after in itertools.pairwise(seen):
        with torch.no_grad():
            expected = model.carried(hidden(before), after.z_BL)
        torch.testing.assert_close(after.estimate_BLD, expected)
        known = after.z_BL != MASK
        if model.config.mixing == "interpolated":
            assert (after.estimate_BLD[known][:, -1] == 1).all()
            torch.testing.assert_close(after.estimate_BLD[known][:, :-1], model.embed(after.z_BL[known]))


@pytest.mark.parametrize("keys", [HIDDEN, ENTROPY], ids=str)
def test_guidance_carries_two_of_them(keys):
    model, batch = make(inject_layer=0, **keys).eval(), make_batch()
    prompt = torch.zeros_like(batch.z).bool()
    prompt[:, :3] = True
    view = Guided(model, MASK, None, 2.0, prompt)
    with torch.no_grad():
        first = view.hidden(batch.z, batch.t, None)
        found = view.hidden(batch.z, batch.t, view.carried_estimate(first, batch.z))
        for part, z in zip(found.chunk(2, -1), view.inputs(batch.z), strict=True):
            state = State(z, batch.t)
            torch.testing.assert_close(
                part, model.hidden(dataclasses.replace(state, estimate_BLD=model.estimate(state)))
            )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["model.carried=hidden", "model.mixing=interpolated"], "mixing"),
        (["model.carried=hidden", "model.estimate_top_k=3"], "estimate_top_k"),
        (["model.carried=hidden", "model.estimate_temperature=2"], "estimate_temperature"),
        (["model.mixing=interpolated", "model.conditioner=norm"], "conditioner"),
        (["model.mixing=interpolated", "model.inject_layer=1"], "inject_layer"),
        (["model.mixing=interpolated", "model.inject_at=masked"], "inject_at"),
        (["model.confidence=top1"], "confidence"),
    ],
)
def test_keys_without_meaning_are_refused(given, named):
    with pytest.raises(UserError, match=rf"model\.{named}=.*model\.(carried|mixing)="):
        load_config(RunConfig, None, KEYS + given)
