"""What training sees of what is carried: perturbed, from a rollout, from a frozen base; each against a reference."""

import dataclasses
import itertools

import pytest
import torch

from scmdm.config.loading import load_config
from scmdm.config.presets import PRESETS
from scmdm.config.run import RunConfig
from scmdm.diffusion.noise import keyed_normal
from scmdm.diffusion.objective import self_conditioned_nelbo, token_weights
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.errors import UserError
from scmdm.models.flops import step_flops
from scmdm.models.initialization import init_weights
from scmdm.models.model_files import ModelSpec
from scmdm.planner.sharding import rank_state
from scmdm.planner.workload import make_layout, make_workload
from scmdm.training.step import _noise
from tests.models.test_carrying import (
    DIT,
    ENTROPY,
    HIDDEN,
    KEYS,
    LENGTH,
    MASK,
    VOCAB,
    dense_carried,
    dense_hidden,
    dense_nll,
    make,
    make_batch,
    step,
)


def sequences(rows=6, length=LENGTH):
    x = torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(1))
    return Sequences(x, torch.ones_like(x).bool(), torch.arange(rows))


def times(rows=6):
    return torch.linspace(0.2, 1, rows).double()


def rolled_out(steps, block_length=None, rate=1.0):
    draws = {"schedule": LogLinear(), "mask_id": MASK, "seed": 0, "step": 0, "block_length": block_length}
    return noise_batch(sequences(), times(), rate=rate, rollout_steps=steps, **draws)


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_states_of_a_rollout_are_nested_and_end_before_the_loss_pass(steps, block_length):
    batch, plain = rolled_out(steps, block_length), rolled_out(0, block_length)
    assert torch.equal(batch.z, plain.z) and len(batch.rollout) == steps
    states = [*batch.rollout, (batch.z, batch.t)]
    for (noisier, earlier), (z, t) in itertools.pairwise(states):
        assert ((z == MASK) <= (noisier == MASK)).all() and (earlier >= t).all()
    assert (batch.rollout[0][0] == MASK).sum() > (batch.z == MASK).sum()
    times_BK = torch.stack([t for _, t in states], 1)
    torch.testing.assert_close(times_BK.diff(dim=1), times_BK.diff(dim=1)[:, :1].expand(-1, steps))


@pytest.mark.parametrize("block_length", [None, 4])
def test_a_rollout_begins_within_its_span(block_length):
    rows, span = 4096, 0.1
    draws = {"schedule": LogLinear(), "mask_id": MASK, "seed": 0, "step": 0, "rate": 1.0, "block_length": block_length}
    t_B = torch.linspace(0.2, 1, rows).double()
    batch = noise_batch(sequences(rows), t_B, rollout_steps=1, rollout_span=span, **draws)
    ((z_BL, s_B),) = batch.rollout
    age_B = (s_B - t_B) / (1 - t_B).clamp(max=span, min=1e-12)
    assert ((s_B >= t_B) & (s_B <= 1)).all() and (s_B - t_B).max() <= span and abs(age_B[:-1].mean() - 0.5) < 0.02
    share = ((z_BL == MASK) & (batch.z != MASK)).double().mean()
    assert abs(share - (s_B - t_B).mean()) < 0.005


@pytest.mark.parametrize(("preset", "sign"), [("residual_context", -1), ("soft_masking", 1)])
def test_presets_decide_which_positions_carry_more(preset, sign):
    config = load_config(RunConfig, None, [*KEYS, f"self_conditioning.preset={preset}", "model.width=16"])
    model_config = dataclasses.replace(config.model, self_conditioned=True)
    model = ModelSpec(model_config, config.diffusion, VOCAB, MASK, LENGTH).build().to_empty(device="cpu")
    init_weights(model, seed=0)
    with torch.no_grad():
        model.conditioner.strength.fill_(1.0)
    low, high = model.conditioner(torch.tensor([[[0.1], [0.9]]])).flatten()
    assert sign * (high - low) > 0.5


@pytest.mark.parametrize("keys", [{}, HIDDEN, ENTROPY, HIDDEN | {"inject_layer": 2}], ids=str)
@pytest.mark.parametrize(("steps", "block_length"), [(1, None), (3, None), (2, 4)])
def test_a_step_with_a_rollout_is_the_plain_one(keys, steps, block_length):
    model, batch = (
        make(block_length=block_length, **{"inject_layer": 0, **DIT, **keys}),
        rolled_out(steps, block_length),
    )
    loss, gradients = step(model, batch, share=False)
    states, carried = [*batch.rollout, (batch.z, batch.t)], None
    with torch.no_grad():
        for (z, t), (following, _) in itertools.pairwise(states):
            h = dense_hidden(model, State(z, t, clean_BL=batch.clean), carried)
            carried = *dense_carried(model, h, following), torch.ones_like(batch.conditioned)
    plain = dense_nll(model, dense_hidden(model, State(batch.z, batch.t, clean_BL=batch.clean), carried), batch)
    model.zero_grad()
    plain.backward()
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-4, msg=name)


def test_evaluations_of_a_rollout_are_counted():
    output = self_conditioned_nelbo(make(inject_layer=0), rolled_out(3), LogLinear(), condition=True)
    assert output.passes == 4


@pytest.mark.parametrize("keys", [{}, HIDDEN, ENTROPY], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_only_the_last_estimate_is_perturbed(keys, passes):
    model = make(inject_layer=0, **keys)
    batch = make_batch()
    noise = torch.randn(*batch.z.shape, 16, generator=torch.Generator().manual_seed(5))
    noisy = dataclasses.replace(batch, perturbation=0.5 * noise)
    loss, _ = step(model, noisy, share=False, passes=passes)
    carried = None
    with torch.no_grad():
        for _ in range(passes):
            carried = model.estimate(State(batch.z, batch.t, carried))
        masked = (batch.z == MASK)[..., None]
        if keys == HIDDEN:
            carried = carried + 0.5 * noise * carried.square().mean(-1, keepdim=True).sqrt()
        else:
            added = 0.5 * noise * model.vocab_embed.embedding.square().mean().sqrt() * masked
            carried = torch.cat([carried[..., :16] + added, carried[..., 16:]], -1)
        expected, _ = model.weighted_nll(State(batch.z, batch.t, carried), batch.x, token_weights(batch, LogLinear()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_noise_is_keyed_on_the_sample_alone():
    """Neither the batch, nor its length, nor the order of its samples changes what a sample gets."""
    config = load_config(RunConfig, None, [*KEYS, "self_conditioning.perturbation=0.5", "model.width=16"])
    whole = _noise(config, LogLinear(), MASK, sequences(), times(), 3).perturbation
    part = _noise(config, LogLinear(), MASK, sequences()[2:4], times()[2:4], 3).perturbation
    assert torch.equal(whole[2:4], part)
    shorter = _noise(config, LogLinear(), MASK, sequences(length=7), times(), 3).perturbation
    assert torch.equal(whole[:, :7], shorter)
    assert not torch.equal(whole, _noise(config, LogLinear(), MASK, sequences(), times(), 4).perturbation)
    plain = load_config(RunConfig, None, KEYS)
    assert _noise(plain, LogLinear(), MASK, sequences(), times(), 3).perturbation is None


def test_normal_draws_are_standard_normal():
    draws = keyed_normal(0, "test", 0, torch.arange(4), 50_001)
    assert draws.shape == (4, 50_001) and draws.dtype == torch.float32 and draws.isfinite().all()
    normal = torch.distributions.Normal(0.0, 1.0)
    at = torch.linspace(-3, 3, 25)
    below = (draws[..., None] < at).float().mean((0, 1))
    torch.testing.assert_close(below, normal.cdf(at), atol=4e-3, rtol=0)
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(draws[:, :50_000].reshape(-1, 2).T)[0, 1].abs() < 0.01


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["rollout_steps=2", "passes=2"], "passes"),
        (["rollout_span=0.1"], "rollout_span"),
        (["carried_from=base", "passes=2"], "passes"),
        (["carried_from=base", "rollout_steps=2"], "rollout_steps"),
        (["carried_from=base", "stop_gradient=false"], "stop_gradient"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(given, named):
    with pytest.raises(UserError, match=rf"self_conditioning\.{named}="):
        load_config(RunConfig, None, [*KEYS, *(f"self_conditioning.{one}" for one in given)])


def loaded(tmp_path, text="", *given):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(RunConfig, path, ["run_dir=r", "data.path=d", "train.steps=1", *given])


def values_of(config, keys):
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in keys}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_keys_and_is_stored_with_them(name, tmp_path):
    preset = PRESETS[name]
    expected = preset.defining | preset.defaults
    for config in (
        loaded(tmp_path, "", f"self_conditioning.preset={name}"),
        loaded(tmp_path, f"self_conditioning:\n  preset: {name}\nmodel:\n  width: 64\n"),
    ):
        assert values_of(config, expected) == expected
    assert set(PRESETS["scmdm"].defining) == {
        "self_conditioning.rate",
        "model.carried",
        "model.mixing",
        "self_conditioning.carried_from",
    }


def test_a_default_of_a_preset_is_overridden_and_its_definition_contradicted(tmp_path):
    own = "self_conditioning.preset=soft_masking"
    assert loaded(tmp_path, "model: {estimate_top_k: 5}", own).model.estimate_top_k == 5
    assert loaded(tmp_path, "", own, "model.estimate_top_k=null").model.estimate_top_k is None
    with pytest.raises(UserError, match=r"model\.mixing=.*self_conditioning\.preset=soft_masking"):
        loaded(tmp_path, "model: {mixing: added}", own)
    with pytest.raises(UserError, match=r"self_conditioning\.rate=.*self_conditioning\.preset=analog_bits"):
        loaded(tmp_path, "self_conditioning: {rate: 1.0}", "self_conditioning.preset=analog_bits")
    with pytest.raises(UserError, match=r"self_conditioning\.preset="):
        loaded(tmp_path, "", "self_conditioning.preset=unheard_of")


def test_the_last_preset_given_is_the_one(tmp_path):
    config = loaded(tmp_path, "self_conditioning: {preset: loopholing}", "self_conditioning.preset=soft_masking")
    assert (config.model.carried, config.model.mixing) == ("estimate", "interpolated")


def test_the_plan_knows_further_passes_and_the_copy_of_the_base():
    def planned(*given):
        config = load_config(RunConfig, None, [*KEYS, "base=b", "model.width=32", *given])
        config = resolved(config)
        spec = ModelSpec(config.model, config.diffusion, VOCAB, MASK, LENGTH)
        return make_workload(config, spec), config

    plain, _ = planned()
    rolled, config = planned("self_conditioning.rollout_steps=3")
    assert (plain.passes, rolled.passes, config.estimate_passes) == (1, 3, 3)
    copied, config = planned("self_conditioning.carried_from=base")
    layout = make_layout(config, 2, torch.float32)
    without, with_copy = rank_state(plain, layout), rank_state(copied, layout)
    assert with_copy.base == with_copy.weights == without.weights and without.base == 0
    assert with_copy.total == without.total + without.weights
    adapters, config = planned("self_conditioning.carried_from=base", "model.lora_rank=2")
    assert not adapters.copies_base and rank_state(adapters, layout).base == 0
    none, config = planned("self_conditioning.rate=0", "self_conditioning.rollout_steps=3")
    assert none.passes == config.estimate_passes == 0


def resolved(config):
    conditioned = config.self_conditioning.rate > 0
    return dataclasses.replace(config, model=dataclasses.replace(config.model, self_conditioned=conditioned))


def test_passes_that_differ_share_no_blocks():
    def shared(*given):
        return load_config(RunConfig, None, [*KEYS, "model.inject_layer=2", *given]).shared_layers

    assert shared() == shared("self_conditioning.perturbation=1") == shared("model.carried=hidden") == 2
    assert shared("self_conditioning.rollout_steps=1") == 0
    assert shared("self_conditioning.carried_from=base") == 0


def test_a_hidden_state_saves_the_products_with_the_vocabulary():
    config = make(inject_layer=0).config
    count = {"vocab_size": 50_000, "length": 64, "schedule": LogLinear(), "passes": 1}
    own, hidden, top_k = (
        step_flops(dataclasses.replace(config, **keys), **count)
        for keys in ({}, {"carried": "hidden"}, {"estimate_top_k": 3})
    )
    logits = own.estimate_passes - top_k.estimate_passes
    assert own.estimate_passes - hidden.estimate_passes == pytest.approx(2 * logits)
    assert own.loss_pass == hidden.loss_pass
