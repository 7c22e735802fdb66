"""The mixture of experts: routing, products, gradients, memory, and what training records of it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from scmdm.config.run import RunConfig
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.process import noise_batch
from scmdm.diffusion.schedule import LogLinear
from scmdm.diffusion.state import Sequences, State
from scmdm.distributed.engine import SingleEngine
from scmdm.errors import UserError
from scmdm.models.compilation import compile_model
from scmdm.models.decoder import Decoder
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.experts.balance import load_summary, update_balance
from scmdm.models.experts.expert_block import sort_by_expert
from scmdm.models.experts.router import attach_record, routers_of
from scmdm.models.initialization import init_weights
from scmdm.models.lora import adapters_off, add_adapters, freeze, is_trained, merged
from scmdm.ops.grouped_product import grouped_product_loop
from scmdm.torch_private import TorchDispatchMode, grouped_mm, tree_leaves
from scmdm.training.optimizer import make_optimizer
from scmdm.training.step import train_step

VOCAB, MASK, LENGTH = 19, 18, 12
SIGMOID = {
    "router": "sigmoid",
    "router_groups": 4,
    "router_top_groups": 2,
    "router_scale": 2.5,
    "router_bias": True,
    "shared_experts": 1,
    "dense_layers": 1,
}


def config_of(**changes):
    options = {"experts": 8, "experts_per_token": 2, "expert_width": 12, "mlp_width": 40, **changes}
    return DecoderConfig(width=16, layers=2, heads=2, **options)


def model_of(config, seed=0):
    config.validate()
    model = Decoder(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    init_weights(model, seed)
    return model


def plain_mixture(mixture, config, x_BLD):
    """Token by token, as the papers write it."""
    rows = []
    for x_D in x_BLD.flatten(0, 1):
        logits = mixture.router.weight @ x_D
        scores = logits.sigmoid() if config.router == "sigmoid" else logits.softmax(0)
        ranked = scores + (mixture.router.balance.expert_bias if config.router_bias else 0)
        size = config.experts // config.router_groups
        groups = sorted(
            range(config.router_groups),
            key=lambda g: -ranked[g * size : (g + 1) * size].topk(min(2, size)).values.sum(),
        )
        allowed = [e for g in groups[: config.router_top_groups] for e in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda e: -ranked[e])[: config.experts_per_token]
        total = sum(scores[e] for e in chosen) if config.router_renormalise else 1
        y_D = torch.zeros_like(x_D)
        for e in chosen:
            hidden = F.silu(mixture.gate.weight[e] @ x_D) * (mixture.up.weight[e] @ x_D)
            y_D = y_D + config.router_scale * scores[e] / total * (mixture.down.weight[e] @ hidden)
        if config.shared_experts:
            hidden = F.silu(mixture.shared_gate(x_D)) * mixture.shared_up(x_D)
            y_D = y_D + mixture.shared_down(hidden)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BLD)


@pytest.mark.parametrize("changes", [{}, {"router_renormalise": False, "experts_per_token": 3}, SIGMOID], ids=str)
def test_a_mixture_is_the_sum_over_the_experts_of_each_token(changes):
    config = config_of(**changes)
    mixture = model_of(config).blocks[1].experts
    if mixture.router.balance is not None:
        with torch.no_grad():
            mixture.router.balance.expert_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, expected = mixture(x), plain_mixture(mixture, config, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    inputs = [x, *(parameter for parameter in mixture.parameters() if parameter.requires_grad)]
    for one, two in zip(
        torch.autograd.grad(y.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert torch.equal(y, mixture(x)), "not deterministic"


@pytest.mark.parametrize("alignment", [1, 4])
def test_rows_are_sorted_by_expert_and_padded(alignment):
    chosen = torch.tensor([[3, 0], [0, 3], [3, 1]])
    order = sort_by_expert(chosen, 5, alignment)
    starts = [0, *order.ends_E.tolist()]
    assert all(size % alignment == 0 for size in order.ends_E.diff().tolist())
    for token, row in enumerate(order.row_NT.tolist()):
        for place, at in enumerate(row):
            expert = int(chosen[token, place])
            assert starts[expert] <= at < starts[expert + 1] and order.token_P[at] == token
    assert len(order.row_NT.unique()) == chosen.numel()
    assert len(order.token_P) == (6 if alignment == 1 else 6 + 5 * 3)


def test_the_kernel_computes_what_the_loop_does():
    """On a CPU, for which torch has the operator, too; groups may be empty, and rows may follow the last one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, generator=generator).bfloat16()
    weight = torch.randn(4, 24, 16, generator=generator).bfloat16()
    ends = torch.tensor([8, 8, 24, 24], dtype=torch.int32)
    try:
        found = grouped_mm(x, weight.transpose(1, 2), ends)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no kernel on this device: {error}")
    expected = grouped_product_loop(x, weight, ends)
    torch.testing.assert_close(found[:24], expected[:24], rtol=2e-2, atol=2e-2)


def sequences(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, MASK, (count, LENGTH), generator=generator)
    everywhere = torch.ones(count, LENGTH, dtype=torch.bool)
    return Sequences(tokens, everywhere, torch.arange(count))


def batch_of(config_rate=1.0, count=4):
    return noise_batch(
        sequences(count),
        torch.linspace(0.3, 0.9, count).double(),
        schedule=LogLinear(),
        mask_id=MASK,
        seed=0,
        step=0,
        rate=config_rate,
    )


def test_an_expert_without_tokens_has_zero_gradients():
    model = model_of(config_of(router_renormalise=False))
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.zero_()  # equal scores: all tokens go to the same experts
    attach_record(model, balance_loss=0.1, z_loss=0.1)
    record = routers_of(model)[0].record
    with record.recording():
        output = self_conditioned_nelbo(model, batch_of(), LogLinear(), condition=False)
    (output.loss + record.take_loss()).backward()
    counts = record.take_counts()
    assert (counts > 0).sum(1).tolist() == [2, 2] and counts.sum(1).tolist() == [4 * LENGTH * 2] * 2
    for number, block in enumerate(model.blocks):
        for module in (block.experts.gate, block.experts.up, block.experts.down):
            unused = counts[number] == 0
            assert module.weight.grad.isfinite().all() and not module.weight.grad[unused].any()
            assert module.weight.grad[~unused].any()


class Largest(TorchDispatchMode):
    """Size of the largest tensor that is made in the block."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_memory_is_proportional_to_tokens_times_experts_per_token():
    """The largest tensor of a pass does not grow with the number of experts beyond the scores and the weights."""
    largest = []
    for experts in (8, 64):
        mixture = model_of(config_of(experts=experts)).blocks[0].experts
        x = torch.randn(8, 64, 16)
        with Largest() as made, torch.no_grad():
            mixture(x)
        largest.append(made.largest)
    tokens = 8 * 64
    assert largest[0] == tokens * 2 * 16 and largest[1] == max(tokens * 2 * 16, tokens * 64)


def test_the_pass_without_gradients_keeps_and_records_nothing():
    model = model_of(config_of(self_conditioned=True, **SIGMOID))
    record = attach_record(model, balance_loss=0.1, z_loss=0.0)
    kept = []
    with record.recording(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            model.estimate(state_of(batch_of()))
        assert not kept and record.take_loss() is None
        output = self_conditioned_nelbo(model, batch_of(), LogLinear(), condition=True)
    assert kept and output.passes == 2
    assert record.take_counts().sum(1).tolist() == [4 * LENGTH * 2], "one pass counts"


def state_of(batch):
    return State(batch.z, batch.t, None, batch.packing, batch.labels, batch.clean)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_losses_and_counts_do_not_depend_on_the_division_or_on_recomputation(checkpointing):
    results = []
    for parts in (1, 2):
        config = config_of(activation_checkpointing=checkpointing, **{**SIGMOID, "dense_layers": 0})
        model = model_of(config).train()
        record = attach_record(model, balance_loss=0.3, z_loss=0.2)
        batch, losses = batch_of(), []
        for rows in torch.arange(4).chunk(parts):
            part = noise_batch(
                sequences()[rows[0] : rows[-1] + 1],
                torch.linspace(0.3, 0.9, 4).double()[rows],
                schedule=LogLinear(),
                mask_id=MASK,
                seed=0,
                step=0,
                rate=1.0,
            )
            with record.recording():
                output = self_conditioned_nelbo(model, part, LogLinear(), condition=False)
            losses.append(record.take_loss())
            (output.loss + losses[-1]).backward()
        assert batch.z.shape == (4, LENGTH)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((sum(losses).detach(), record.take_counts(), grads))
    (loss_1, counts_1, grads_1), (loss_2, counts_2, grads_2) = results
    torch.testing.assert_close(loss_1, loss_2, rtol=1e-5, atol=1e-6)
    assert torch.equal(counts_1, counts_2) and counts_1.sum() == 2 * 4 * LENGTH * 2
    assert grads_1.keys() == grads_2.keys()
    for name, grad in grads_1.items():
        torch.testing.assert_close(grad, grads_2[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_balance_loss_is_one_per_position_when_balanced():
    model = model_of(config_of())
    record = attach_record(model, balance_loss=1.0, z_loss=0.0)
    router = routers_of(model)[0]
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :8] = 20 * torch.eye(8)
    x = torch.zeros(1, 8, 16)
    x[0, :, :8] = torch.eye(8) + torch.eye(8).roll(1, 0)  # each expert gets two of the sixteen choices
    with record.recording():
        router(x)
    assert float(record.take_loss()) == pytest.approx(8.0, rel=1e-5)


def test_the_bias_moves_against_the_load_and_only_where_the_router_is_trained():
    model = model_of(config_of(**{**SIGMOID, "dense_layers": 0}))
    routers = routers_of(model)
    assert not is_trained("blocks.0.experts.router.balance.expert_bias", RunConfig(model=model.config))
    routers[1].weight.requires_grad_(False)
    counts = torch.tensor([[0, 2, 4, 2, 2, 2, 2, 2]] * 2)
    update_balance(model, counts, 0.5)
    assert routers[0].balance.expert_bias.tolist() == [0.5, 0, -0.5, 0, 0, 0, 0, 0]
    assert not routers[1].balance.expert_bias.any()


def test_the_summary_of_loads():
    equal, single = load_summary(torch.full((2, 4), 3)), load_summary(torch.tensor([[8, 0, 0, 0]]))
    assert equal == {"expert_entropy": pytest.approx(1), "expert_max_share": 0.25, "dropped_tokens": 0}
    assert single == {"expert_entropy": 0, "expert_max_share": 1, "dropped_tokens": 0}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("router_bias", {"experts": 0, "experts_per_token": 1, "expert_width": None, "router_bias": True}),
        ("dense_layers", {"dense_layers": 2}),
        ("router_groups", {"router_groups": 3}),
        ("router_groups", {"router_groups": 8}),
        ("router_top_groups", {"router_groups": 2, "router_top_groups": 3}),
        ("experts_per_token", {"router_groups": 4, "router_top_groups": 1, "experts_per_token": 3}),
        ("mlp_bias", {"mlp_bias": True}),
        ("matmul_precision", {"matmul_precision": "fp8", "mlp_width": 48}),
        ("compile", {"compile": "trunk"}),
        ("rotary_fraction", {"rotary_fraction": 0.1}),
    ],
)
def test_what_does_not_fit_is_refused(key, changes):
    with pytest.raises(UserError, match=f"model.{key}"):
        config_of(**changes).validate()


@pytest.mark.slow
def test_compiled_blocks_route_as_the_model_as_written():
    ids_BL = torch.arange(2 * LENGTH).view(2, -1) % VOCAB
    state = State(ids_BL.masked_fill(ids_BL % 3 == 0, MASK), torch.rand(2).double())
    plain, compiled = model_of(config_of()), model_of(config_of())
    compile_model(compiled, "block")
    for model in (plain, compiled):
        model.hidden(state).sin().sum().backward()
    # Of the output head, hidden states have no gradient.
    pairs = [pair for pair in zip(plain.parameters(), compiled.parameters(), strict=True) if pair[0].grad is not None]
    assert len(pairs) == len(list(plain.parameters())) - 1
    for one, other in pairs:
        assert (other.grad - one.grad).norm() <= 1e-5 * one.grad.norm()


@pytest.mark.parametrize("targets", [[], ["attn_q", "attn_v"], ["experts.gate", "experts.down"]])
def test_adapters_of_experts_begin_at_zero_and_merge(targets):
    config = config_of(lora_rank=3, lora_targets=targets, dense_layers=1, shared_experts=1)
    plain = model_of(dataclasses.replace(config, lora_rank=0, lora_targets=[]))
    with torch.device("meta"):
        adapted = Decoder(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
        add_adapters(adapted.blocks, config)
    adapted.to_empty(device="cpu")
    adapted.rotary_emb.reset_parameters()
    init_weights(adapted, 0)
    state = state_of(batch_of())
    assert torch.equal(adapted.hidden(state), plain.hidden(state))
    names = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    wanted = targets or ["attn_q", "attn_k", "attn_v", "attn_out", "experts.gate", "experts.up", "experts.down"]
    assert {f"blocks.1.{target}" for target in wanted} <= names
    assert any("experts" in name for name in names) == (not targets or "experts.gate" in targets)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        for name, value in merged(sorted(adapted.named_parameters()), config):
            plain.get_parameter(name).copy_(value)
        torch.testing.assert_close(adapted.hidden(state), plain.hidden(state), rtol=1e-4, atol=1e-4)
        base = model_of(plain.config).hidden(state)
        assert not torch.allclose(adapted.hidden(state), base, atol=1e-2)
        with adapters_off(adapted):
            assert torch.equal(adapted.hidden(state), base)


def step_of(balance_loss=0.01, loss_per="token", prepare=lambda model: None):
    """A step of a mixture; returns its result, the engine, and the weights before it."""
    run = RunConfig(model=config_of(router_loss=balance_loss, self_conditioned=True, **SIGMOID), seed=1)
    run.train.micro_batch_size, run.train.loss_per = 2, loss_per
    run.self_conditioning.rate = 1.0
    model = model_of(run.model)
    attach_record(model, balance_loss=balance_loss, z_loss=0.0)
    prepare(model)
    freeze(model, run)
    engine = SingleEngine(model, make_optimizer(model, run.optimizer), torch.device("cpu"), torch.float32)
    before = [p.clone() for p in model.blocks[1].experts.parameters()]
    return train_step(engine, run, LogLinear(), MASK, sequences(), 0), engine, before


def test_a_step_updates_the_bias_and_reports_the_load_of_the_global_batch():
    result, engine, before = step_of()
    assert result.expert_tokens.shape == (1, 8) and int(result.expert_tokens.sum()) == 4 * LENGTH * 2
    bias = routers_of(engine.model)[0].balance.expert_bias
    mean = result.expert_tokens.double().mean()
    assert torch.equal(bias.sign().double(), (mean - result.expert_tokens[0]).sign())
    assert "blocks.1.experts.router.balance.expert_bias" in engine.frozen()
    assert any(not torch.equal(a, b) for a, b in zip(before, engine.model.blocks[1].experts.parameters(), strict=True))


def test_a_step_that_is_not_finite_leaves_the_bias():
    """Everything else is left by the optimizer, which knows nothing of the bias."""
    models = []

    def spoil(model):
        models.append(model)
        model.output_layer.linear.weight.data.fill_(float("nan"))

    with pytest.raises(UserError, match="not finite"):
        step_of(prepare=spoil)
    assert not routers_of(models[0])[0].balance.expert_bias.any()


def test_the_loss_that_balances_does_not_depend_on_how_the_other_is_averaged():
    """For samples with as many tokens each, `train.loss_per` changes nothing."""
    (by_token, *_), (by_sample, *_) = (step_of(balance_loss=10.0, loss_per=what) for what in ("token", "sample"))
    assert by_sample.loss == pytest.approx(by_token.loss, rel=1e-5)
    assert by_sample.grad_norm == pytest.approx(by_token.grad_norm, rel=1e-4)
