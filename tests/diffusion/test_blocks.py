"""The NELBO of blocks against enumeration, and the noise of blocks."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from scmdm.diffusion.blocks import both_copies, dense_mask, places_of, spread_times
from scmdm.diffusion.likelihood import nelbo_of, nelbo_terms
from scmdm.diffusion.objective import self_conditioned_nelbo
from scmdm.diffusion.packing import make_packing
from scmdm.diffusion.process import noise_batch, stratified_times
from scmdm.diffusion.schedule import LogLinear, make_schedule
from scmdm.diffusion.state import Sequences, State
from scmdm.models.decoder import Decoder
from scmdm.models.decoder_config import DecoderConfig
from scmdm.models.dit import DiT, DiTConfig
from scmdm.models.initialization import init_weights
from scmdm.planner.activation_memory import LiveBytes
from tests.diffusion.oracle import BlockOracle

VOCAB = 6
MASK = VOCAB - 1
CONFIGS = {
    "dit": (DiT, DiTConfig(width=16, layers=2, heads=2, condition_width=8, self_conditioned=True)),
    "decoder": (Decoder, DecoderConfig(width=16, layers=2, heads=2, kv_heads=1, self_conditioned=True)),
    "shifted": (Decoder, DecoderConfig(width=16, layers=2, heads=2, self_conditioned=True, logit_shift=True)),
}


def small_model(kind="dit", block_length=None):
    make, config = CONFIGS[kind]
    model = make(config, vocab_size=VOCAB, mask_id=MASK, schedule=LogLinear())
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.block_length = block_length
    return model.eval()


def tokens(rows, length, seed=0):
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


def sequences(x, **more):
    return Sequences(x, torch.ones_like(x).bool(), torch.arange(len(x)), **more)


def noised(x, block_length, t=None, **more):
    t = stratified_times(0, 0, torch.arange(len(x)), 1e-3) if t is None else t
    keys = {"schedule": LogLinear(), "mask_id": MASK, "seed": 0, "step": 0, "rate": 1.0} | more
    return noise_batch(sequences(x), t, block_length=block_length, t_min=1e-3, **keys)


def log_p(model, z, x, estimate=None, clean=None):
    state = State(z, torch.ones(len(z), dtype=torch.float64), estimate, clean_BL=clean)
    logits = model.logits(model.hidden(state).flatten(0, 1)).view(*z.shape, -1)
    return logits.log_softmax(-1).gather(2, x[..., None]).squeeze(2)


def exact_nelbo(model, x, size, *, condition=False):
    """The sum over blocks and over the sets of masks of a block, each evaluated with all earlier tokens clean."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for start in range(0, x.shape[1], size):
        block = range(start, min(start + size, x.shape[1]))
        for count in range(1, len(block) + 1):
            for masked in itertools.combinations(block, count):
                z = x.clone()
                z[:, block.stop :] = MASK
                z[:, list(masked)] = MASK
                estimate = None
                if condition:
                    estimate = model.estimate(State(z, torch.ones(len(z), dtype=torch.float64)))
                    estimate[:, : block.start], estimate[:, block.stop :] = 0, 0
                nll = -log_p(model, z, x, estimate)[:, list(masked)].double().sum(1)
                total += nll / (count * math.comb(len(block), count))
    return total


@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize(("kind", "size"), [("dit", 2), ("dit", 3), ("decoder", 1), ("shifted", 2)])
@torch.no_grad()
def test_the_nelbo_is_the_sum_over_blocks_and_sets_of_masks(kind, size, condition):
    """For blocks of one token the sum is the autoregressive likelihood of the network."""
    model, x = small_model(kind, size), tokens(1, 4)
    exact = exact_nelbo(model, x, size, condition=condition)
    if size == 1 and not condition:
        each = [log_p(model, x[:, : at + 1].index_fill(1, torch.tensor([at]), MASK), x[:, : at + 1]) for at in range(4)]
        torch.testing.assert_close(exact[0], -sum(row[0, -1] for row in each).double(), rtol=1e-5, atol=0)
    many = [sequences(x.expand(6000, -1))]
    found = nelbo_of(
        nelbo_terms(model, many, LogLinear(), mask_id=MASK, seed=0, t_min=1e-4, condition=condition, block_length=size)
    )
    assert abs(found.mean * 4 - float(exact)) < 4 * found.stderr * 4 + 2e-3
    assert found.stderr * 4 < 0.05 * float(exact)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", [LogLinear(), make_schedule("cosine")], ids=str)
def test_the_nelbo_of_the_oracle_is_the_entropy(size, schedule):
    oracle = BlockOracle(size, length=4, tokens=2)
    rows = torch.multinomial(oracle.joint, 20000, replacement=True, generator=torch.Generator().manual_seed(0))
    terms = nelbo_terms(
        oracle,
        [sequences(oracle.sequences[rows])],
        schedule,
        mask_id=oracle.mask_id,
        seed=0,
        t_min=1e-3,
        block_length=size,
    )
    entropy = float(-(oracle.joint * oracle.joint.log()).sum()) / oracle.length
    assert abs(nelbo_of(terms).mean - entropy) < 4 * nelbo_of(terms).stderr


@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize("rollout_steps", [0, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_block_is_the_plain_objective(kind, rollout_steps, condition):
    """The same times and masks, and the same losses and gradients."""
    x, model = tokens(8, 6), small_model(kind)
    found = []
    for size in (None, 6, 100):
        model.block_length = size
        batch = noised(x, size, rollout_steps=rollout_steps, rate=0.5)
        output = self_conditioned_nelbo(model, batch, LogLinear(), condition=condition)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        found.append((batch, output, gradients))
    (plain, expected, expected_gradients), *others = found
    for batch, output, gradients in others:
        assert torch.equal(batch.z, plain.z) and len(batch.rollout) == rollout_steps
        for (ours, _), (theirs, _) in zip(batch.rollout, plain.rollout, strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            if theirs is not None:
                assert float((ours - theirs).norm() / theirs.norm().clamp(min=1e-3)) < 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_both_copies_at_once_are_each_block_after_clean_ones(kind):
    """What a sampler evaluates for a block is what training evaluates for it."""
    model, x = small_model(kind, 3), tokens(4, 8)
    batch = noised(x, 3)
    estimate = model.estimate(State(batch.z, batch.t, clean_BL=x))
    first = log_p(model, batch.z, x, clean=x)
    second = log_p(model, batch.z, x, estimate, clean=x)
    for start in range(0, 8, 3):
        own = slice(start, start + 3)
        z = torch.cat([x[:, :start], batch.z[:, own], torch.full_like(x, MASK)[:, start + 3 :]], 1)
        alone = model.estimate(State(z, batch.t))
        alone[:, :start], alone[:, start + 3 :] = 0, 0
        torch.testing.assert_close(estimate[:, own], alone[:, own])
        torch.testing.assert_close(first[:, own], log_p(model, z, x)[:, own])
        torch.testing.assert_close(second[:, own], log_p(model, z, x, alone)[:, own])


@torch.no_grad()
def test_later_blocks_and_other_documents_are_not_seen():
    model, x = small_model(block_length=2), tokens(1, 7)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    packing = make_packing(documents)
    z = x.clone()
    z[:, [1, 2, 4, 6]] = MASK
    t = torch.ones(1, dtype=torch.float64)
    packed = model.hidden(State(z, t, packing=packing, clean_BL=x))
    for own in (slice(0, 3), slice(3, 7)):
        torch.testing.assert_close(packed[:, own], model.hidden(State(z[:, own], t, clean_BL=x[:, own])))
        torch.testing.assert_close(
            model.hidden(State(z, t, packing=packing))[:, own], model.hidden(State(z[:, own], t))
        )


@pytest.mark.parametrize("packed", [False, True])
def test_the_mask_by_hand(packed):
    """Every pair of positions, from the definition."""
    size, length = 2, 5
    packing = make_packing(torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])) if packed else None
    found = dense_mask(*[both_copies(places_of(length, size, packing, torch.device("cpu")))] * 2)[:, 0]
    for row, q, k in itertools.product(range(len(found)), range(2 * length), range(2 * length)):
        at_q, at_k, same = q % length, k % length, True
        if packing is not None:
            same = bool(packing.documents_BL[row, at_q] == packing.documents_BL[row, at_k])
            at_q, at_k = (int(packing.positions_BL[row, at]) for at in (at_q, at_k))
        block_q, block_k = at_q // size, at_k // size
        if q < length:
            expected = block_k == block_q if k < length else block_k < block_q
        else:
            expected = k >= length and block_k <= block_q
        assert bool(found[row, q, k]) == (expected and same), (row, q, k)


def test_times_of_blocks_are_stratified_keyed_and_independent_of_the_batch():
    ids, maskable = torch.arange(40), torch.ones(40, 8, dtype=torch.bool)
    maskable[:, :2] = False  # a prompt
    keys = {"t_min": 0.01, "seed": 3, "step": 5}
    t_B = stratified_times(3, 5, ids, 0.01)
    t = spread_times(t_B, ids, maskable, 2, None, **keys)
    assert torch.equal(t[:, 0::2], t[:, 1::2])
    places = ((t[:, 2::2] - 0.01) / 0.99).sort(1).values  # three blocks with maskable tokens
    torch.testing.assert_close(places.diff(dim=1), torch.full((40, 2), 1 / 3).double())
    everything = places.flatten().sort().values
    torch.testing.assert_close(everything.diff(), torch.full((119,), 1 / 120).double())
    assert len({tuple(row) for row in t[:, 2::2].argsort(1).tolist()}) == 6  # all orders of three
    torch.testing.assert_close(spread_times(t_B[7:9], ids[7:9], maskable[7:9], 2, None, **keys), t[7:9], rtol=0, atol=0)
    longer = torch.nn.functional.pad(maskable, (0, 6))  # padding
    torch.testing.assert_close(spread_times(t_B, ids, longer, 2, None, **keys)[:, :8], t, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_memory_of_training_and_evaluation_has_no_canvas_times_vocabulary(kind):
    """Both passes of a step with its gradients, and the NELBO; half of the positions are masked."""
    vocab, length = 20_000, 128
    make, config = CONFIGS[kind]
    config = replace(config, head_chunk=4)
    model = make(config, vocab_size=vocab, mask_id=vocab - 1, schedule=LogLinear()).train()
    init_weights(model, 0)
    model.block_length = 16
    x = tokens(1, length)
    with LiveBytes(model.parameters()) as live:
        batch = noised(x, 16, mask_id=vocab - 1)
        self_conditioned_nelbo(model, batch, LogLinear(), condition=True).loss.backward()
    assert live.peak < length * vocab * 4 / 2
    keys = {"mask_id": vocab - 1, "seed": 0, "t_min": 1e-3, "condition": True, "block_length": 16}
    with LiveBytes(model.parameters()) as live:
        nelbo_of(nelbo_terms(model.eval(), [sequences(x)], LogLinear(), **keys))
    assert live.peak < length * vocab * 4 / 2
