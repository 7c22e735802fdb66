"""One optimizer step: accumulation, finiteness, groups, schedule, averaging."""

import math

import pytest
import torch

from scmdm.config.run import RunConfig
from scmdm.config.training import EmaConfig, OptimizerConfig, ScheduleConfig
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences
from scmdm.distributed.ema import Ema
from scmdm.distributed.engine import SingleEngine
from scmdm.errors import UserError
from scmdm.models.compilation import compile_model, cpp_compiler
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.training.optimizer import lr_factor, make_optimizer, parameter_groups, set_lr
from scmdm.training.step import train_step

MASK = 9


def make(micro=64, rate=1.0, compiled="none", **optimizer):
    config = RunConfig()
    config.train.global_batch_size, config.train.micro_batch_size = 64, micro
    config.self_conditioning.rate = rate
    config.optimizer = OptimizerConfig(lr=1e-2, **optimizer)
    model_config = DiTConfig(width=16, layers=2, heads=2, condition_width=8, self_conditioned=rate > 0)
    model = DiT(model_config, vocab_size=10, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    compile_model(model, compiled)
    engine = SingleEngine(model, make_optimizer(model, config.optimizer), torch.device("cpu"), torch.float32)
    set_lr(engine.optimizer, 1.0)
    return engine, config


def batch(valid_part=1.0):
    x = torch.randint(0, 9, (64, 12), generator=torch.Generator().manual_seed(0))
    valid = torch.rand(64, 12, generator=torch.Generator().manual_seed(1)) < valid_part
    return Sequences(x, valid, torch.arange(1000, 1064))


def run(engine, config, steps=3, valid_part=1.0):
    data = batch(valid_part)
    return [train_step(engine, config, LogLinear(), MASK, data, step) for step in range(steps)]


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("valid_part", [1.0, 0.6])
def test_accumulation_changes_neither_loss_nor_update(rate, valid_part):
    """1 x 64 against 4 x 16, with unequal numbers of valid tokens per micro-batch."""
    whole, parts = make(64, rate), make(16, rate)
    for a, b in zip(run(*whole, valid_part=valid_part), run(*parts, valid_part=valid_part), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert (a.tokens, a.evaluations) == (b.tokens, b.evaluations)
        assert a.evaluations == 64 * (1 if rate == 0 else 2)
    for ours, theirs in zip(whole[0].model.parameters(), parts[0].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_step_passes_its_settings_on(monkeypatch):
    """Passes, dropout and the rollout reach the objective: what the no-grad passes see, and how often."""
    engine, config = make()
    seen = []

    def estimate(state, *, dropout):
        masks, times = int((state.z_BL == MASK).sum()), float(state.t_B.sum())
        seen.append((masks, times, state.estimate_BLD is None, dropout))
        return type(engine.model).estimate(engine.model, state, dropout=dropout)

    monkeypatch.setattr(engine.model, "estimate", estimate)
    config.self_conditioning.passes, config.self_conditioning.estimate_dropout = 3, False
    (result,) = run(engine, config, steps=1)
    assert result.evaluations == 64 * 4
    assert [(null, dropout) for _, _, null, dropout in seen] == [(True, False), (False, False), (False, False)]
    config.self_conditioning.rollout_steps, config.self_conditioning.estimate_dropout = 1, True
    run(engine, config, steps=1)
    assert seen[3][0] > seen[0][0] and seen[3][1] > seen[0][1] and seen[3][3] and len(seen) == 4
    config.self_conditioning.rollout_span = 0.01
    run(engine, config, steps=1)
    assert seen[0][1] < seen[4][1] <= seen[0][1] + 64 * 0.01 < seen[3][1]


def test_the_loss_falls():
    engine, config = make()
    x = (torch.arange(12) % 9).expand(64, -1)
    valid, ids = torch.ones_like(x).bool(), torch.arange(64)
    losses = [train_step(engine, config, LogLinear(), MASK, Sequences(x, valid, ids), step).loss for step in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    engine, config = make()
    with torch.no_grad():
        engine.model.output_layer.linear.bias[0] = value
    before = {name: p.clone() for name, p in engine.parameters().items()}
    with pytest.raises(UserError, match=r"step 0: loss .*optimizer\.lr"):
        run(engine, config, steps=1)
    after = engine.parameters()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_parameter_groups():
    engine, _ = make()
    groups = parameter_groups(engine.model, OptimizerConfig(lr=1e-3, conditioner_lr=5e-3, weight_decay=0.1))
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    names = dict(engine.model.named_parameters())
    assert len(by_parameter) == len(names)
    for name, parameter in names.items():
        group = by_parameter[id(parameter)]
        no_decay = "norm" in name or name.endswith("bias") or name.startswith("vocab_embed")
        assert group["weight_decay"] == (0.0 if no_decay else 0.1), name
        assert group["peak_lr"] == (5e-3 if name.startswith("conditioner") else 1e-3), name


def test_embeddings_of_labels_are_not_decayed():
    model = DiT(
        DiTConfig(width=16, layers=1, heads=2, condition_width=8, labels=True),
        vocab_size=10,
        mask_id=MASK,
        schedule=LogLinear(),
        classes=3,
    )
    decayed = {
        id(p)
        for g in parameter_groups(model, OptimizerConfig(weight_decay=0.1))
        for p in g["params"]
        if g["weight_decay"]
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    assert embeddings and names and not names & embeddings


def test_clipping_bounds_the_gradient():
    engine, config = make(clip=1e-3)
    seen = []
    original = engine.step
    engine.step = lambda skip: (seen.append(float(engine.clip_grad_norm(0))), original(skip))
    result = train_step(engine, config, LogLinear(), MASK, batch(), 0)
    assert result.grad_norm > 1e-3 and seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_schedules():
    constant = ScheduleConfig("constant", warmup_steps=4)
    assert [lr_factor(s, 10, constant) for s in (0, 3, 4, 9)] == [0.25, 1.0, 1.0, 1.0]
    linear = ScheduleConfig("linear", warmup_steps=0, final_ratio=0.1)
    assert lr_factor(5, 10, linear) == pytest.approx(0.55)
    cosine = ScheduleConfig("cosine", warmup_steps=2, final_ratio=0.0)
    assert lr_factor(6, 10, cosine) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert lr_factor(10, 10, cosine) == pytest.approx(0.0)


def test_ema_follows_its_formula_and_starts_anew():
    engine, config = make()
    ema = Ema(engine, EmaConfig(decay=0.99, warmup=True))
    expected = {name: p.clone() for name, p in engine.parameters().items()}
    data = batch()
    for k in range(5):
        train_step(engine, config, LogLinear(), MASK, data, k)
        ema.update(engine)
        decay = min(0.99, (2 + k) / (11 + k))
        expected = {n: decay * v + (1 - decay) * engine.parameters()[n] for n, v in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name], value)
    assert ema.update_number == 6
    before = {name: p.clone() for name, p in engine.parameters().items()}
    with ema.applied(engine):
        assert all(torch.equal(p, ema.average[n]) for n, p in engine.parameters().items())
    assert all(torch.equal(p, before[n]) for n, p in engine.parameters().items())
    assert Ema(engine, EmaConfig(decay=0.99)).decay() == pytest.approx(2 / 11), "an adaptation's average is young again"


@pytest.mark.slow
@pytest.mark.skipif(cpp_compiler() is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same_and_keep_their_names():
    plain, compiled = make(), make(compiled="block")
    for ours, theirs in zip(run(*compiled), run(*plain), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    assert compiled[0].parameters().keys() == plain[0].parameters().keys()
